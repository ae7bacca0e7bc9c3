"""A Lightning job: dropout, schedules, validation, checkpoints, a log.

Arguments: epochs, batches of a rank in each update, and the folder that the Trainer writes to.
While a seat is empty its updates take longer, so that the rank which was lost is back in time.
"""

import sys
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ftkit
from ftkit.integrations.lightning import FtkitStrategy

#: Batches of 4, so that an epoch is whole updates of six.
ROWS, BATCH = 96, 4


def rows() -> TensorDataset:
    points = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(1))
    return TensorDataset(points, (points.norm(dim=1) > 1.2).long())


class Circle(lightning.LightningModule):
    """In or out of a circle."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 2))
        self.seen: list[tuple[int, int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append((self.trainer.current_epoch, self.trainer.global_step))
        session = ftkit.init()
        if session.world_size < session.seats:
            time.sleep(0.3)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 7, gamma=0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def trainer_of(epochs: int, accumulate: int, folder: Path, **more: Any) -> Any:
    checkpoint = ModelCheckpoint(
        dirpath=folder, filename="{epoch}-{step}", monitor="val_loss", save_top_k=2, save_last=True
    )
    settings: dict[str, Any] = {
        "callbacks": [checkpoint, EarlyStopping("val_loss", patience=100)],
        "gradient_clip_val": 1.0,
        **more,
    }
    if "strategy" not in settings:
        settings["strategy"] = FtkitStrategy()
    return lightning.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=0.5,
        **settings,
    )


def loaders() -> dict[str, Any]:
    return {
        "train_dataloaders": DataLoader(rows(), batch_size=BATCH, shuffle=True),
        "val_dataloaders": DataLoader(rows(), batch_size=50),
    }


def main(epochs: int, accumulate: int, folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Circle()
    trainer = trainer_of(epochs, accumulate, folder)
    trainer.fit(model, **loaders())
    checkpoint = trainer.checkpoint_callback
    told: dict[str, Any] = {
        "updates": trainer.global_step,
        "epoch": trainer.current_epoch,
        "seen": model.seen,
        "best": Path(checkpoint.best_model_path).name,
        "score": checkpoint.best_model_score.item(),
        "validated": trainer.callback_metrics["val_loss"].item(),
        "first": trainer.is_global_zero,
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
    }
    ftkit.init().trace.event("trained", **told)
    return told


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
