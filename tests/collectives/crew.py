"""Runs a scenario in several fresh processes and collects what each returns.

A scenario is a module-level function `(rank, size, talk)`; `talk` is its line to the test:
`talk.everyone(value)` swaps a value with all others, `talk.say` / `talk.hear` speak with the
test alone. Nothing but pipes is shared, so a killed member harms nobody else's line.
"""

# mypy: allow-untyped-calls

import multiprocessing as mp
import os
import signal
import traceback
from multiprocessing.connection import Connection, wait
from typing import Any, Self

# A fork server imports torch once; members start in milliseconds from a process that never
# ran an operation, and so holds no thread that a fork could lose.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.fsdp",
        "torch.distributed.device_mesh",
        "torch.distributed._functional_collectives",
        "ftkit.collectives.backend",
    ]
)


class Talk:
    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def say(self, value: Any) -> None:
        self._pipe.send(("say", value))

    def hear(self) -> Any:
        return self._pipe.recv()

    def everyone(self, value: Any) -> list[Any]:
        self._pipe.send(("everyone", value))
        values: list[Any] = self._pipe.recv()
        return values


def _body(function, rank, size, pipe, args):
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send(("result", function(rank, size, Talk(pipe), *args)))
    except BaseException:  # noqa: BLE001 - the test shows whatever it was
        pipe.send(("error", traceback.format_exc()))
    pipe.close()
    os._exit(0)


class Crew:
    """`with Crew(scenario, 3) as crew:` - all members are dead afterwards."""

    def __init__(self, function: Any, size: int, *args: Any, timeout_s: float = 50.0) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self._function, self._args = function, args
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        for rank in range(size):
            self.add(rank)

    def add(self, rank: int, *more: Any, function: Any = None) -> None:
        mine, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(
            target=_body,
            args=(function or self._function, rank, self.size, theirs, self._args + more),
        )
        process.start()
        theirs.close()
        self.processes.append(process)
        self.pipes.append(mine)

    def kill(self, rank: int, sig: int = signal.SIGKILL) -> None:
        os.kill(self.processes[rank].pid, sig)

    def hear(self, rank: int) -> Any:
        kind, value = self._receive(rank)
        if kind == "error":
            raise AssertionError(f"member {rank} failed:\n{value}")
        return value

    def _receive(self, rank: int) -> tuple[str, Any]:
        if not self.pipes[rank].poll(self.timeout_s):
            raise AssertionError(f"member {rank} said nothing for {self.timeout_s} s")
        message: tuple[str, Any] = self.pipes[rank].recv()
        return message

    def say(self, rank: int, value: Any) -> None:
        self.pipes[rank].send(value)

    def swap(self, ranks: list[int] | None = None) -> list[Any]:
        """Serve one `everyone` round."""
        ranks = list(range(len(self.pipes))) if ranks is None else ranks
        values = [self.hear(rank) for rank in ranks]
        for rank in ranks:
            self.say(rank, values)
        return values

    def results(self, ranks: list[int] | None = None) -> list[Any]:
        """Serve `everyone` rounds until each of `ranks` has returned; their values."""
        ranks = list(range(len(self.pipes))) if ranks is None else ranks
        done: dict[int, Any] = {}
        waiting: dict[int, Any] = {}
        while len(done) < len(ranks):
            open_ = [r for r in ranks if r not in done and r not in waiting]
            ready = wait([self.pipes[r] for r in open_], timeout=self.timeout_s)
            if not ready:
                raise AssertionError(f"members {open_} said nothing for {self.timeout_s} s")
            for rank in open_:
                if self.pipes[rank] not in ready:
                    continue
                kind, value = self.pipes[rank].recv()
                if kind == "error":
                    raise AssertionError(f"member {rank} failed:\n{value}")
                if kind == "everyone":
                    waiting[rank] = value
                elif kind == "result":
                    done[rank] = value
            if waiting and len(waiting) + len(done) == len(ranks):
                values = [waiting[r] for r in sorted(waiting)]
                for rank in waiting:
                    self.say(rank, values)
                waiting.clear()
        return [done[rank] for rank in ranks]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join(10)
        for pipe in self.pipes:
            pipe.close()
