"""MendedOp: one collective that may run several times, in one world after another.

It is *committed* at a rank when everybody has said that it holds the result: an empty round
behind the operation. In front of it, after a loss, goes a round of notes: one rank may have
issued it before the loss and another one after, with ranks and sizes of other worlds. From the
notes all see the same, and do the same:

* a sum that is to be scaled, is scaled by the largest world that anybody had in mind;
* what has a place for each rank is refused, unless all mean the ranks that there are;
* a broadcast is refused where its root is lost, or another one to somebody else.

Once an operation was issued by all for the world that there is, so is what follows it, and
goes without notes.
"""

import struct
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ftkit.collectives.arithmetic import Bytes, copy, scale
from ftkit.collectives.channel import Channel
from ftkit.collectives.config import OnLoss
from ftkit.collectives.handle import Handle
from ftkit.collectives.moves import exchange
from ftkit.collectives.op import Op, Program, Wait
from ftkit.core.errors import GenerationAborted, ProtocolError
from ftkit.core.ids import Generation, MemberId

_COMMIT, _NOTES = 0xFFFF, 0xFFFE
_EMPTY: Bytes = np.empty(0, dtype=np.uint8)
_NOTE = struct.Struct("!Iq")


@dataclass(slots=True)
class Again:
    """How an operation can be run a second time."""

    data: Bytes
    """What it overwrites, and starts from."""
    summed: torch.dtype | None = None
    """Set for sums of floats, which LEAVE_OUT scales."""
    root: MemberId | None = None
    """Without whom there is nothing to run."""


class _Note(NamedTuple):
    """What a rank meant when the operation was issued there."""

    size: int
    root: int
    """A member, or -1."""

    @classmethod
    def read(cls, data: bytes) -> "_Note":
        if len(data) != _NOTE.size:
            raise ProtocolError(f"a note of {len(data)} bytes, not {_NOTE.size}")
        return cls(*_NOTE.unpack(data))


@dataclass(slots=True, eq=False, kw_only=True)
class MendedOp:
    """See the module. Changed by the communication thread, and by the mender between two worlds."""

    channel: Channel
    name: str
    program: Program
    nbytes: int
    limit_s: float | None
    mode: OnLoss
    again: Again | None
    """None: it cannot run in another world than the one it was issued for."""
    understood: dict[Channel, Generation]
    """In which generation all are known to issue for the world that there is; shared by all."""
    handle: Handle[Any] = field(default_factory=Handle)
    """What the caller waits for."""
    held: bool = False
    """Whether we have the result; it may not be committed."""
    _size: int = field(init=False)
    _kept: Bytes | None = field(init=False)
    _value: Any = None
    _refusal: str | None = None

    def __post_init__(self) -> None:
        """Copy what will be overwritten."""
        self._size = self.channel.size
        again = self.again
        self._kept = again.data.copy() if again is not None and again.data.size else None

    def launch(self) -> Handle[Any]:
        """Issue it in the channel's generation. GenerationAborted: it may be launched again."""
        self.held = False
        return self.channel.issue(
            self.name, self._committing, nbytes=self.nbytes, timeout_s=self.limit_s
        )

    def restore(self) -> None:
        """Bring back what an earlier run has overwritten."""
        if self.again is not None and self._kept is not None:
            copy(self.again.data, self._kept)

    def complete(self) -> None:
        """It is committed: the caller gets the result, or learns why there can be none."""
        if self._refusal is None:
            self.handle.finish(self._value)
        else:
            self.handle.fail(GenerationAborted(self._refusal))

    def _committing(self, op: Op) -> Generator[Wait, None, None]:
        notes = [self._note]
        if self.channel.fixed is None and self.understood[self.channel] != op.generation:
            told = np.frombuffer(_NOTE.pack(*self._note), dtype=np.uint8)
            came = yield from exchange(told, tag=_NOTES)(op)
            notes = [_Note.read(data) for data in came]
            if all(note.size == op.size for note in notes):
                self.understood[self.channel] = op.generation
        self._refusal = self._refusal_of(notes, op)
        if self._refusal is None:
            self._value = yield from self.program(op)
            self._scale(max(note.size for note in notes), op.size)
        self.held = True
        others = op.others()
        sent = [op.send(rank, _EMPTY, tag=_COMMIT) for rank in others]
        yield [*sent, *(op.recv(rank, None, tag=_COMMIT) for rank in others)]

    @property
    def _note(self) -> _Note:
        root = None if self.again is None else self.again.root
        return _Note(self._size, -1 if root is None else root)

    def _refusal_of(self, notes: list[_Note], op: Op) -> str | None:
        if self.again is None and any(note.size != op.size for note in notes):
            return f"a member was lost in {self.name}, whose result has a place for every rank"
        roots = sorted({note.root for note in notes} - set(op.members) - {-1})
        if roots:
            return f"the root of {self.name}, member {roots[0]}, is lost"
        roots = sorted({note.root for note in notes})
        if len(roots) > 1:
            return f"the root of {self.name} is one of members {roots}: a member was lost meanwhile"
        return None

    def _scale(self, before: int, now: int) -> None:
        again = self.again
        if self.mode is not OnLoss.LEAVE_OUT or again is None or again.summed is None:
            return
        if before != now:
            scale(again.summed, again.data, before / now)
