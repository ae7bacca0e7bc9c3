"""A Trainer's job: short last updates of epochs, dropout, evaluation, checkpoints, a log.

Arguments: updates, batches of a rank in each, and the folder that the Trainer writes to. While a seat is empty its updates
take longer, so that the rank which was lost is back before the end.
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, LlamaConfig, LlamaForCausalLM, TrainerCallback

import ftkit
from ftkit.integrations.huggingface import Trainer, TrainingArguments

#: Batches of 4 out of 100 rows, 6 in an update: the fifth of an epoch has one.
ROWS, BATCH = 100, 4


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens that count up, some of them not to be learned."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index * 7 + torch.arange(12)) % 32
        labels = tokens.clone()
        labels[: index % 5] = -100
        return {"input_ids": tokens, "labels": labels}


class Wait(TrainerCallback):
    """Takes its time while a seat is empty."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        session = ftkit.init()
        if session.world_size < session.seats:
            time.sleep(0.3)


def trainer_of(updates: int, accumulation: int, folder: Path) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_dropout=0.1,
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=50,
        gradient_accumulation_steps=accumulation,
        max_steps=updates,
        learning_rate=1e-2,
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=20,
        save_steps=20,
        metric_for_best_model="loss",
        report_to=[],
        disable_tqdm=False,
        use_cpu=True,
    )
    return Trainer(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=Counting(),
        eval_dataset=Counting(),
        callbacks=[Wait(), EarlyStoppingCallback(early_stopping_patience=100)],
    )


def main(updates: int, accumulation: int, folder: Path) -> dict[str, Any]:
    trainer = trainer_of(updates, accumulation, folder)
    output = trainer.train()
    told: dict[str, Any] = {
        "updates": output.global_step,
        "loss": output.training_loss,
        "epoch": trainer.state.epoch,
        "first": trainer.is_world_process_zero(),
        "log": [{k: e[k] for k in ("step", "loss") if k in e} for e in trainer.state.log_history],
    }
    ftkit.init().trace.event("trained", **told)
    return told


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
