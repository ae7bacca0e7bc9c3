"""Lane: one direction of a rotation, a message to the next rank and one from the last, each step.

Receives are posted one step ahead of the sends. On gloo a receive is announced to the sender, and
an announcement for one direction queues behind the data of the other: with receives posted step by
step, two directions ran one after the other.
"""

from collections.abc import Callable

import torch

from ftkit.collectives.overlap.flights import Flight, Flights


class Lane:
    """See the module. `send` and `receive` once a step each."""

    def __init__(
        self,
        flights: Flights,
        expected: Callable[[int], torch.Tensor],
        *,
        direction: int,
        steps: int,
        tag: int,
    ) -> None:
        """Post the first receive.

        Args:
          flights: of the operation.
          expected: memory for what comes in a step; it may be empty, and then nothing does.
          direction: 1 sends to the next rank, -1 to the one before.
          steps: so many.
          tag: the first of `steps` tags.
        """
        self._flights, self._expected, self._steps, self._tag = flights, expected, steps, tag
        self._to = (flights.rank + direction) % flights.size
        self._from = (flights.rank - direction) % flights.size
        self._sent = self._received = 0
        self._posted: list[tuple[torch.Tensor, Flight | None]] = []
        self._post()

    def send(self, message: torch.Tensor) -> None:
        """Let it go; it must stay as it is until the operation ends."""
        if message.numel():
            self._flights.send(message, self._to, self._tag + self._sent)
        self._sent += 1
        self._post()

    def receive(self) -> torch.Tensor:
        """The message of the next step. Blocks."""
        into, flight = self._posted[self._received]
        self._received += 1
        return into if flight is None else flight.wait()

    def _post(self) -> None:
        step = len(self._posted)
        if step < self._steps:
            into = self._expected(step)
            flight = None
            if into.numel():
                flight = self._flights.recv(into, self._from, self._tag + step)
            self._posted.append((into, flight))


def pack(*tensors: torch.Tensor) -> torch.Tensor:
    """Tensors of one dtype as one run of memory, newly made."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unpack(message: torch.Tensor, *shapes: torch.Size | tuple[int, ...]) -> list[torch.Tensor]:
    """Views of these shapes, one after another."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    return [
        part.view(shape) for part, shape in zip(torch.split(message, sizes), shapes, strict=True)
    ]
