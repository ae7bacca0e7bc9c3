"""A pipeline of eight small layers, some of which take their time. For drills of stages that move.

    pipeline.py STEPS MS_OF_EACH_LAYER [fixed|approximate|swapped]

"0,0,20,20,0,0,0,0": layers 2 and 3 sleep 20 ms a slot. `fixed`: no layers move while it trains; nor with
`approximate`, which allows approximate recovery. `swapped`: the same with the outer stages swapped on every
other slot (CheckFree+).
"""

import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import ftkit

WIDTH, SLOTS, SLOT_SIZE, LAYERS = 12, 4, 2, 8


class Points:
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x = torch.linspace(0.0, 1.0 + index / 64, WIDTH)
        return x, x.cos()


class Layer(nn.Module):
    """Has dropout, running statistics, and a time that it takes."""

    def __init__(self, index: int, seconds: float) -> None:
        super().__init__()
        torch.manual_seed(index)
        self.seconds = seconds
        self.mix = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU(), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        mixed: Tensor = x + self.mix(x)
        return mixed


class Stage(nn.Module):
    def __init__(self, held: range, seconds: list[float]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Layer(i, seconds[i]) for i in held})
        self.step: Any = None
        self.slot = 0

    def forward(self, x: Tensor) -> Tensor:
        slot, self.slot = self.slot, self.slot + 1
        for index, module in self.layers.items():
            x = self.step.layer(int(index), module, x, slot=slot)
        return x


def main() -> None:
    steps = int(sys.argv[1])
    seconds = [float(ms) / 1000 for ms in sys.argv[2].split(",")]
    torch.set_num_threads(1)
    session = ftkit.init()
    schedule: Any = None

    def build(mesh: Any) -> Any:
        nonlocal schedule
        session.role(mesh)
        bounds, rank, size = session.cut([1.0] * LAYERS), session.rank, session.world_size
        model = Stage(range(bounds[rank], bounds[rank + 1]), seconds)
        first = torch.zeros(SLOT_SIZE, WIDTH)
        hidden = torch.zeros(SLOT_SIZE, WIDTH, requires_grad=True)
        if mode == "swapped":
            held = {int(i): module for i, module in model.layers.items()}
            schedule = session.swapped(held, hidden=hidden, loss_fn=nn.functional.mse_loss)
            return finish(model)
        stage = PipelineStage(
            model, rank, size, torch.device("cpu"),
            input_args=first if rank == 0 else hidden, output_args=hidden,
        )  # fmt: skip
        schedule = Schedule1F1B(stage, SLOTS, loss_fn=nn.functional.mse_loss, scale_grads=False)
        return finish(model)

    def finish(model: Stage) -> Any:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.99**n)
        return model, optimizer, decay

    mode = sys.argv[3] if len(sys.argv) > 3 else ""
    session.protect(
        build=build,
        device="cpu",
        stages=True,
        recut=not mode,
        allow_approximate="checkfree+" if mode == "swapped" else mode == "approximate",
    )
    for step in session.steps(Points(), slots=SLOTS, slot_size=SLOT_SIZE, until=steps):
        model: Any = session.model
        with step:
            batches = step.slots()
            losses: list[Tensor] = []
            model.step, model.slot = step, 0
            inputs = [torch.cat([x for x, _ in batches])] if session.rank == 0 else []
            more: dict[str, Any] = {}
            if session.rank == session.world_size - 1:
                more = {"target": torch.cat([y for _, y in batches]), "losses": losses}
            if mode == "swapped":
                losses = schedule.play(step, [x for x, _ in batches], [y for _, y in batches])
            else:
                schedule.step(*inputs, **more, return_outputs=False)
            for slot, loss in enumerate(losses):
                step.record(loss, slot=slot)
            step.clip_grad_norm_(1.0)
            session.optimizer.step()
            session.optimizer.zero_grad()
            session.scheduler.step()
    session.close()


if __name__ == "__main__":
    main()
