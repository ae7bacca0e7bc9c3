"""The task through ftkit: run by `ftkit run`."""

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import ftkit
from benchmarks.beside.task import StepLog, Task
from benchmarks.toy import BLOCKS, Noise, build, loss_of, optimizer_of


class Numbered(Dataset[tuple[int, Tensor]]):
    """All blocks of the task in order, each with its number."""

    def __init__(self, task: Task) -> None:
        self._blocks = Noise(task.rows)
        self._count = task.steps * task.slots

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, self._blocks[index % BLOCKS]


def main() -> None:
    """Train."""
    task = Task.from_environ()
    session = ftkit.init()
    model = DistributedDataParallel(build())
    optimizer = optimizer_of(model)
    session.protect(model=model, optimizer=optimizer)
    log = StepLog(task, session.seat)
    log.begin(model, session.step + 1)
    number, played = 0, set[int]()
    for step in session.steps(
        Numbered(task),
        slots=task.slots,
        slot_size=1,
        until=task.steps,
        shuffle=False,
        collate=lambda samples: samples[0],
    ):
        if step.index != number:
            number, played = step.index, set()
        with step:
            for index, block in step.batches():
                # A step that comes round again goes on with the slots that were played before.
                played.add(index)
                log.attempt(step.index, sorted(played))
                loss_of(model, block).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step.committed:
            log.commit()
    log.final(model)


if __name__ == "__main__":
    main()
