"""A small byte-level transformer as a pipeline that loses stages and gets them back.

    ftkit run --nproc 4 examples/pipeline_1f1b.py        (up to 6 stages: it has 6 layers)

When a stage is lost, the others go on with its layers among them, cut by the time each layer takes;
when another process has taken its place, the cut is the first one again.
"""

import argparse
import logging
import os
import sysconfig
import time
from pathlib import Path

import ftkit
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

logger = logging.getLogger("example")

WIDTH, CONTEXT, SLOTS, SLOT_SIZE = 48, 32, 8, 2
COSTS = [0.5, 1, 1, 1, 1, 0.5]  # of each layer, roughly: the first cut is made by it


class Text:
    """Windows of 32 bytes of Python's own sources, and the byte after each."""

    def __init__(self):
        root = Path(sysconfig.get_paths()["stdlib"])
        text = b"".join((root / f"{name}.py").read_bytes() for name in ("argparse", "typing"))
        self.bytes = torch.tensor(list(text))

    def __len__(self):
        return (len(self.bytes) - 1) // CONTEXT

    def __getitem__(self, i):
        window = self.bytes[i * CONTEXT : (i + 1) * CONTEXT + 1]
        return window[:-1], window[1:]


def layer(index):
    torch.manual_seed(index)  # the same first values, whoever holds the layer
    if index == 0:
        return nn.Embedding(256, WIDTH)
    if index == len(COSTS) - 1:
        return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256))
    return Block()


class Block(nn.TransformerEncoderLayer):
    def __init__(self):
        super().__init__(WIDTH, 4, 2 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)

    def forward(self, x):
        past = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return super().forward(x, src_mask=past, is_causal=True)


class Stage(nn.Module):
    """The layers of one rank. Slots come in order, each through `step.layer`."""

    def __init__(self, held):
        super().__init__()
        self.layers = nn.ModuleDict({str(i): layer(i) for i in held})

    def forward(self, x):
        slot, self.slot = self.slot, self.slot + 1
        for index, module in self.layers.items():
            x = self.step.layer(int(index), module, x, slot=slot)
        return x


def loss_fn(logits, y):
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    session = ftkit.init()
    logging.basicConfig(
        format="%(message)s", level="INFO" if os.environ["RANK"] == "0" else "ERROR"
    )
    schedule = None

    def build(mesh):
        nonlocal schedule
        session.role(mesh)  # stages do other work: their pace is not compared
        bounds, rank, size = session.cut(COSTS), session.rank, session.world_size
        model = Stage(range(bounds[rank], bounds[rank + 1]))
        hidden = torch.zeros(SLOT_SIZE, CONTEXT, WIDTH, requires_grad=True)
        tokens = torch.zeros(SLOT_SIZE, CONTEXT, dtype=torch.int64)
        logits = torch.zeros(SLOT_SIZE, CONTEXT, 256, requires_grad=True)
        stage = PipelineStage(
            model, rank, size, torch.device("cpu"),
            input_args=tokens if rank == 0 else hidden,
            output_args=logits if rank == size - 1 else hidden,
        )  # fmt: skip
        schedule = Schedule1F1B(stage, SLOTS, loss_fn=loss_fn, scale_grads=False)
        return model, torch.optim.AdamW(model.parameters(), lr=2e-3)

    session.protect(build=build, stages=True, device="cpu")

    for step in session.steps(Text(), slots=SLOTS, slot_size=SLOT_SIZE, until=options.steps):
        model, optimizer = session.model, session.optimizer
        with step:
            batches, losses = step.slots(), []
            model.step, model.slot = step, 0
            x = [torch.cat([x for x, _ in batches])] if session.rank == 0 else []
            y = torch.cat([y for _, y in batches])
            if session.rank == session.world_size - 1:
                schedule.step(*x, target=y, losses=losses, return_outputs=False)
            else:
                schedule.step(*x, return_outputs=False)
            for slot, loss in enumerate(losses):
                step.record(loss, slot=slot)
            step.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
        logger.info("loss %s", step.loss if step.committed else "none: played again")
        if session.world_size < session.seats:
            time.sleep(0.1)  # or so small a job has ended before anybody is back


if __name__ == "__main__":
    main()
