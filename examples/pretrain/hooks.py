"""What happens after a step: metrics to the log and to a file, and a checkpoint now and then."""

import json
import logging
import time
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

logger = logging.getLogger("pretrain")


def dist_sum(loss):
    """Of all ranks."""
    dist.all_reduce(loss)
    return loss.item()


class MetricsProcessor:
    def __init__(self, config, trainer):
        self.config, self.trainer = config, trainer
        self.last = 0, time.perf_counter()

    def log(self, step, loss):
        """Of `log_freq` steps one is told, by the first rank."""
        if step % self.config.log_freq or dist.get_rank() != 0:
            return
        now = time.perf_counter()
        rate = (step - self.last[0]) * self.trainer.tokens_per_step / (now - self.last[1])
        self.last = step, now
        lr = self.trainer.lr_scheduler.get_last_lr()[0]
        told = {"step": step, "loss": loss, "grad_norm": self.trainer.grad_norm, "lr": lr}
        logger.info("%s  %.0f tokens/s", json.dumps(told), rate)
        if self.config.file:
            with Path(self.config.file).open("a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")


class CheckpointManager:
    """By torch's DCP; all ranks of the group call alike."""

    def __init__(self, config, trainer):
        self.config, self.trainer = config, trainer

    def load(self):
        """Load the newest one. Returns the steps it has behind it; 0 where there is none."""
        # DCP writes the metadata last.
        done = [int(p.parent.name) for p in Path(self.config.folder).glob("*/.metadata")]
        if not self.config.folder or not done:
            return 0
        state = self._state()
        dcp.load(state, checkpoint_id=Path(self.config.folder, str(max(done))))
        set_state_dict(
            *(self.trainer.model, self.trainer.optimizer),
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
        return max(done)

    def save(self, step):
        """Save, if it is the turn of `step`."""
        if self.config.folder and step % self.config.interval == 0:
            dcp.save(self._state(), checkpoint_id=Path(self.config.folder, str(step)))

    def _state(self):
        model, optimizer = get_state_dict(self.trainer.model, self.trainer.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "lr_scheduler": self.trainer.lr_scheduler.state_dict(),
        }
