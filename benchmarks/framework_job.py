"""One small training, under the loop that is named: plain, huggingface or lightning.

    python -m benchmarks.framework_job LOOP STEPS SLOTS WIDTH BATCH

The model, the data, the optimizer and the batches of a step are the same; whose loop it is differs.
"""

import sys
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

ROWS = 4096


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Points and what is to be said of them."""

    def __init__(self, width: int) -> None:
        self.x = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.x[index].flip(0)}


class Net(nn.Module):
    """Four layers; the loss comes with the output, as Hugging Face's Trainer has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.mse_loss(self.layers(x), labels)}


def plain(steps: int, slots: int, width: int, batch: int) -> None:
    """The session's own step loop."""
    import ftkit

    session = ftkit.init()
    torch.manual_seed(0)
    model = Net(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    session.protect(model=model, optimizer=optimizer)
    loader = DataLoader(Rows(width), batch_size=batch, shuffle=True)
    for step in session.steps(loader, slots=slots, until=steps):
        with step:
            for sample in step.batches():
                loss = model(**sample)["loss"]
                loss.backward()
                step.record(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def huggingface(steps: int, slots: int, width: int, batch: int) -> None:
    """The Trainer's."""
    import ftkit
    from ftkit.integrations.huggingface import Trainer, TrainingArguments

    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir="unused",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=slots // ftkit.init().seats,
        max_steps=steps,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    Trainer(model=Net(width), args=arguments, train_dataset=Rows(width)).train()


def lightning(steps: int, slots: int, width: int, batch: int) -> None:
    """Lightning's."""
    import lightning as pl

    import ftkit
    from ftkit.integrations.lightning import FtkitStrategy

    class Module(pl.LightningModule):  # type: ignore[misc]  # Any, wherever it is installed
        def __init__(self) -> None:
            super().__init__()
            self.net = Net(width)

        def training_step(self, sample: Any, index: int) -> Any:
            return self.net(**sample)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy=FtkitStrategy(),
        max_steps=steps,
        accumulate_grad_batches=slots // ftkit.init().seats,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(Rows(width), batch_size=batch, shuffle=True))


LOOPS = {"plain": plain, "huggingface": huggingface, "lightning": lightning}

if __name__ == "__main__":
    name, *sizes = sys.argv[1:]
    LOOPS[name](*(int(size) for size in sizes))
