"""The job that benchmarks run: the bundled training job, which also notes when it begins a step.

`ftkit` writes when a step is committed; to tell repair from the step that is played again one
has to know when a survivor *began* it. So each rank adds an event, over the public API:

    attempt   `step`, `generation`: this rank begins to play the step, now

    ftkit run --nproc 2 -m benchmarks.training --steps 100
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

import ftkit
from ftkit.launch.workload.text import ByteWindows, load_text
from ftkit.launch.workload.train import parse, train


class Noted:
    """A session whose step loop writes `attempt` events; all else is the session's."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def steps(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """The session's steps, each noted as it begins."""
        for step in self._session.steps(*args, **kwargs):
            self._session.trace.event(
                "attempt", step=step.index, generation=self._session.generation
            )
            yield step


def main(argv: Sequence[str] | None = None) -> None:
    """Join the job, train, tell the result by a `final` event."""
    options = parse(argv)
    torch.set_num_threads(options.threads)
    text = load_text(options.data, bytes_max=options.data_bytes_max)
    dataset = ByteWindows(text, context=options.model.context)
    session = ftkit.init()
    result = train(Noted(session), dataset, options)
    session.trace.event("final", params=result.params, loss=result.loss, step=result.steps)


if __name__ == "__main__":
    main()
