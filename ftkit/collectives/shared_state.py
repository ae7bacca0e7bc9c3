"""SharedState: tensors that every rank should hold alike, compared and made alike again.

One hash pass over the tensors, one exchange of the hashes, and where all agree that is all it
costs. Where they do not, the ranks vote (`state_vote`), and those that were outvoted fetch what
they lack, and no more, from all who have it (`state_fetch`). What was fetched is hashed again
before anybody goes on, so at the end all ranks are bit-identical, or all are told that not.

A rank that dies ends the generation in the middle of a fetch, as it ends everything. Call
`sync` again in the next one: it goes on with what is still missing, from those who are left,
and a rank whose tensors are half replaced has no vote until they are whole.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ftkit.collectives import moves
from ftkit.collectives.arithmetic import Bytes, as_bytes
from ftkit.collectives.channel import HasChannel
from ftkit.collectives.state_fetch import (
    Fetch,
    Piece,
    Range,
    pack_wants,
    parse_wants,
    share_out,
    without,
)
from ftkit.collectives.state_hash import hash_of, layout_of
from ftkit.collectives.state_vote import Election, Statement, Strategy, Tie, elect
from ftkit.core.errors import IntegrityError, StateRefused

#: Fetches of a tensor before it is given up: from all holders, then from two of them alone.
ATTEMPTS = 3


@dataclass(frozen=True, slots=True, order=True)
class Difference:
    """One tensor of one rank that is not what the others hold."""

    rank: int
    tensor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StateReport:
    """What was found, the same on every rank; and what was done about it."""

    revision: int
    """Of the state that was elected."""
    differences: tuple[Difference, ...] = ()
    """What did not hold the elected state before, in order of ranks."""
    undecided: tuple[str, ...] = ()
    """Tensors that differ with even votes: nobody can say whose are wrong."""
    told: Mapping[int, str] = field(default_factory=dict)
    """Ranks whose state was not counted because of its revision, and why."""
    refusal: str = ""
    """Why nothing may be repaired; empty when it may."""
    received_bytes: int = 0
    """By this rank, in tensors."""
    sent_bytes: int = 0
    """By this rank, in tensors."""

    @property
    def equal(self) -> bool:
        """Whether all ranks held the same before."""
        return not (self.differences or self.undecided or self.refusal)


class SharedState:
    """See the module. A collective object: all ranks make the same calls in the same order.

    Used by one thread. The tensors stay the caller's, and must not change during a call.
    """

    def __init__(
        self,
        group: HasChannel,
        tensors: Mapping[str, torch.Tensor],
        *,
        revision: int | None = None,
    ) -> None:
        """Share `tensors` among the members of `group`.

        Args:
          group: a Group or an FtkitProcessGroup.
          tensors: dense, of any dtype, device and strides; the same names, dtypes and shapes
            on all ranks.
          revision: what all ranks are known to have agreed on last, from an earlier life; None
            for a newcomer, and at the beginning.
        """
        self.revision = revision
        """The revision that all ranks agreed on last."""
        self._group = group
        self._names = sorted(tensors)
        self._tensors = [tensors[name] for name in self._names]
        self._layout = layout_of({name: tensors[name] for name in self._names})
        self._sizes = [t.numel() * t.element_size() for t in self._tensors]
        self._missing: dict[int, list[Range]] = {}
        """By tensor: what a fetch that was cut short had not brought yet."""
        self._goals: dict[int, int] = {}
        """By tensor with something missing: the hash it is to have."""
        self._hosts: dict[int, Bytes] = {}
        """Where a tensor is received that is not one run of host memory."""

    def compare(self, *, revision: int = 0, timeout_s: float | None = None) -> StateReport:
        """Find out who differs in what; nothing is changed. Blocks for one hash pass.

        Args:
          revision: of the state held, for what is said when ranks stand at different ones.
          timeout_s: after it the generation is aborted.

        Raises:
          GenerationAborted: the generation ended first.
        """
        statement = self._statement(Strategy.POPULAR, revision, None)
        return self._report(self._vote(statement, Tie.REFUSE, timeout_s))

    def sync(
        self,
        revision: int,
        *,
        strategy: Strategy = Strategy.POPULAR,
        tie: Tie = Tie.REFUSE,
        timeout_s: float | None = None,
    ) -> StateReport:
        """Make all ranks hold what most of them hold. Blocks.

        Args:
          revision: of the state held: one more than `self.revision` where that is known. A rank
            that offers another has no vote and receives; `StateReport.told` says so.
          strategy: what this rank lets happen to its state.
          tie: what to do where the votes are even; the same on all ranks.
          timeout_s: for each round of messages; after it the generation is aborted.

        Returns:
          What was found. All ranks now hold the same bits, and `self.revision` is theirs.

        Raises:
          StateRefused: the vote allows no repair; on every rank, and nothing was changed.
          IntegrityError: a tensor was fetched several times and never had the hash that its
            holders stated: it changes while it is sent, or memory or network are bad.
          GenerationAborted: the generation ended first. Call again in the next one.
        """
        if self._missing:
            # Half of it is others' already.
            strategy = Strategy.RECEIVE_ONLY
        election = self._vote(self._statement(strategy, revision, self.revision), tie, timeout_s)
        if election.refusal:
            raise StateRefused(election.refusal)
        received = sent = 0
        if not election.clean:
            self._note_missing(election)
            received, sent = self._mend(election, timeout_s)
        self.revision = election.revision
        return self._report(election, received, sent)

    # -- the vote ---------------------------------------------------------------------------

    def _statement(self, strategy: Strategy, revision: int, previous: int | None) -> Statement:
        return Statement(
            strategy=strategy,
            revision=revision,
            previous=previous,
            layout=self._layout,
            hashes=tuple(hash_of(tensor) for tensor in self._tensors),
        )

    def _vote(self, mine: Statement, tie: Tie, timeout_s: float | None) -> Election:
        said = [Statement.parse(b) for b in self._exchange("state_vote", mine.pack(), timeout_s)]
        return elect(said, names=self._names, tie=tie)

    def _exchange(self, name: str, payload: bytes, timeout_s: float | None) -> list[bytes]:
        data: Bytes = np.frombuffer(payload, dtype=np.uint8)
        handle = self._group.channel.issue(
            name, moves.exchange(data), nbytes=data.size, timeout_s=timeout_s
        )
        answers: list[bytes] = handle.wait()
        return answers

    def _report(self, election: Election, received: int = 0, sent: int = 0) -> StateReport:
        undecided = set(election.undecided)
        return StateReport(
            revision=election.revision,
            differences=tuple(
                Difference(rank, self._names[tensor])
                for rank, tensors in enumerate(election.differing)
                for tensor in tensors
                if tensor not in undecided
            ),
            undecided=tuple(self._names[tensor] for tensor in election.undecided),
            told=election.told,
            refusal=election.refusal,
            received_bytes=received,
            sent_bytes=sent,
        )

    # -- the repair ---------------------------------------------------------------------------

    def _note_missing(self, election: Election) -> None:
        """What this rank lacks of the elected state; what came before a death is not lacking."""
        lacking = election.differing[self._group.channel.rank]
        for tensor in [t for t in self._missing if self._goals[t] != election.elected[t]]:
            del self._missing[tensor]
        for tensor in lacking:
            self._missing.setdefault(tensor, [self._whole(tensor)])
            self._goals[tensor] = election.elected[tensor]
        for tensor in [t for t in self._missing if t not in lacking]:
            del self._missing[tensor]

    def _mend(self, election: Election, timeout_s: float | None) -> tuple[int, int]:
        """Fetch until nobody lacks anything. Returns the bytes received and sent here."""
        received = sent = 0
        for attempt in range(ATTEMPTS + 1):
            mine = [span for spans in self._missing.values() for span in spans]
            # The last round, in which nobody wants anything, is what says that all are whole.
            told = self._exchange("state_wants", pack_wants(mine), timeout_s)
            wants = [parse_wants(data, self._sizes) for data in told]
            if not any(wants):
                self._goals.clear()
                self._hosts.clear()
                return received, sent
            if attempt == ATTEMPTS:
                bad = sorted({self._names[span.tensor] for spans in wants for span in spans})
                raise IntegrityError(
                    f"{', '.join(bad)} never arrived with the hash that its holders stated, in "
                    f"{ATTEMPTS} fetches: it changes while it is sent, or a memory is bad"
                )
            pieces = share_out(wants, election.holders, attempt=attempt)
            rank = self._group.channel.rank
            self._fetch(Fetch.of(pieces, self._memory(pieces, rank)), timeout_s)
            received += sum(p.range.stop - p.range.start for p in pieces if p.receiver == rank)
            sent += sum(p.range.stop - p.range.start for p in pieces if p.holder == rank)
            self._check()
        raise AssertionError("the last attempt returned or raised")

    def _fetch(self, fetch: Fetch, timeout_s: float | None) -> None:
        nbytes = sum(p.range.stop - p.range.start for p in fetch.pieces)
        handle = self._group.channel.issue(
            "state_fetch", fetch.program, nbytes=nbytes, timeout_s=timeout_s
        )
        try:
            handle.wait()
        finally:
            arrived = fetch.arrived()
            for tensor, spans in self._missing.items():
                self._missing[tensor] = without(spans, [s for s in arrived if s.tensor == tensor])

    def _check(self) -> None:
        """Hash what has arrived: what is right is done, what is wrong is wanted again."""
        for tensor in list(self._missing):
            target = self._tensors[tensor]
            host = self._hosts.get(tensor)
            if host is not None:
                with torch.no_grad():
                    target.copy_(torch.from_numpy(host).view(target.dtype).view(target.shape))
            if hash_of(target) == self._goals[tensor]:
                del self._missing[tensor]
            else:
                self._missing[tensor] = [self._whole(tensor)]

    def _whole(self, tensor: int) -> Range:
        return Range(tensor, 0, self._sizes[tensor])

    def _memory(self, pieces: Sequence[Piece], rank: int) -> list[Bytes | None]:
        """The bytes of each tensor this rank sends or receives."""
        memory: list[Bytes | None] = [None] * len(self._tensors)
        for (number, _, _), holder, receiver in pieces:
            if rank not in (holder, receiver) or memory[number] is not None:
                continue
            tensor = self._tensors[number].detach()
            if tensor.device.type == "cpu" and tensor.is_contiguous():
                memory[number] = as_bytes(tensor)
            elif rank == holder:
                memory[number] = as_bytes(tensor.cpu().contiguous())
            else:
                memory[number] = self._hosts.setdefault(
                    number, np.empty(self._sizes[number], dtype=np.uint8)
                )
        return memory
