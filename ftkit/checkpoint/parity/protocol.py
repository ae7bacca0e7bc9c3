"""The parity protocol: when a round counts, and what may be overwritten (pure).

Rule 1: whatever decides this lives here. Rule 2: no I/O and no clock. One node leads; `obey` is
a node's half, and the functions below it are the leader's, and everybody's after a loss. ::

    leader   ASK all ----> choose ----> MAKE on all ----> all made ----> KEEP on all
    node     promise                    pin, encode,                     let go of what was
                                        seal, answer                     kept before

There is nothing to remember for a leader: what counts follows from what the nodes hold. A round
that every node has sealed counts, whether or not its leader lived to say so; one that more than
m nodes of a group lack does not. A node has two buffers: one holds what is kept, the other is
made next, so a round that breaks off costs nothing.

Two nodes may think that they lead. A node obeys the highest ballot it has promised, and no
lower one. A leader asks *all* nodes before it orders anything, so once it knows what they hold,
no order of an older leader can change that any more.

Invariants (tests/checkpoint/parity checks them on every state it reaches):

* P1  Once a round was sealed by all of its nodes, some round can be rebuilt for as long as at
      most m nodes of each group are lost and not yet back in a newer round. Losing nodes does
      not unpublish a round: that is what it is for.
* P2  Once a node was told to keep a round, no older one stands any more.
* P3  A node keeps one round and makes one: it never holds memory for three.
* P4  What is not kept by order, and not being made, is pinned by nobody.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, assert_never

from ftkit.checkpoint.parity.rounds import (
    NOBODY,
    Ballot,
    Groups,
    Holding,
    PartRef,
    RoundId,
    StripeSet,
)
from ftkit.checkpoint.stripes import Code, deal
from ftkit.core.ids import Generation, NodeId, Step
from ftkit.core.inventory import Copy, Inventory

# A node's half.


@dataclass(frozen=True, slots=True)
class Standing:
    """What a node has promised, keeps and makes. Made anew by `obey` only."""

    promised: Ballot = NOBODY
    kept: RoundId | None = None
    """Not to be overwritten, neither its parity nor its parts."""
    fresh: RoundId | None = None
    """In the other buffer."""
    sealed: bool = False
    """`fresh` is whole."""

    @property
    def pinned(self) -> frozenset[RoundId]:
        """The rounds whose parts no rank may overwrite."""
        return frozenset(r for r in (self.kept, self.fresh) if r is not None)

    @property
    def whole(self) -> frozenset[RoundId]:
        """The rounds whose parity is here."""
        return self.pinned if self.sealed else self.pinned - {self.fresh}


@dataclass(frozen=True, slots=True)
class Ask:
    """A leader wants to know what there is, and to be obeyed from now on."""

    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Make:
    """Make parity of a round in the buffer that does not hold `keep`."""

    ballot: Ballot
    round: RoundId
    keep: RoundId | None


@dataclass(frozen=True, slots=True)
class Made:
    """(from this node itself) The parity of a round is sealed."""

    round: RoundId


@dataclass(frozen=True, slots=True)
class Failed:
    """(from this node itself) The parity of a round could not be made."""

    round: RoundId


@dataclass(frozen=True, slots=True)
class Keep:
    """This round counts; whatever else a node holds it may overwrite."""

    ballot: Ballot
    round: RoundId


Event: TypeAlias = Ask | Make | Made | Failed | Keep


def obey(state: Standing, event: Event) -> tuple[Standing, str]:
    """The next state, and why the event was refused; "" when it was not.

    Every event is accepted in every state, and a refused one changes nothing.
    """
    match event:
        case Ask(ballot):
            if ballot <= state.promised:
                return state, f"node {state.promised.leader} leads, by ballot {state.promised}"
            return replace(state, promised=ballot), ""
        case Make(ballot, round_, keep):
            if ballot != state.promised:
                return state, f"ballot {state.promised} was promised, not {ballot}"
            # What the leader counts on and this node lacks it has lost; there is no more to keep.
            kept = keep if keep in state.whole else None
            return Standing(ballot, kept, round_), ""
        case Made(round_):
            if state.fresh != round_:
                return state, "another round has taken its place"
            return replace(state, sealed=True), ""
        case Failed(round_):
            if state.fresh != round_:
                return state, "another round has taken its place"
            return replace(state, fresh=None, sealed=False), ""
        case Keep(ballot, round_):
            if ballot != state.promised:
                return state, f"ballot {state.promised} was promised, not {ballot}"
            if round_ not in state.whole:
                # Dropping what it has would leave this node with nothing.
                return state, f"the parity of step {round_.step} is not here"
            return Standing(ballot, kept=round_), ""
        case _:
            assert_never(event)


# What follows from all nodes together.


def usable(holding: Holding, holders: Iterable[NodeId]) -> bool:
    """Whether a round can be rebuilt when these nodes, and no others, hold all of it."""
    there = frozenset(holders)
    return all(len(set(group) - there) <= holding.m for group in holding.groups)


def standing(held: Mapping[NodeId, Sequence[Holding]]) -> Holding | None:
    """The round that a leader has the nodes keep until the next is whole; None: there is none.

    Of those that can be rebuilt the one that misses fewest nodes, for one half made must not
    take the place of one that is whole; of several the oldest, for it does without a node that
    was lost, is back and may be lost again, while the newer are being made with its help. Unless
    all who hold that one hold a newer one too: it may have been published, and is as good.

    Args:
      held: what each node that lives says.
    """
    there = {h: nodes for h, nodes in _holders(held).items() if usable(h, nodes)}
    if not there:
        return None
    safe = min(there, key=lambda h: (len({n for g in h.groups for n in g} - there[h]), h.round))
    return max((h for h in there if there[h] >= there[safe]), key=lambda h: h.round)


def awaited(
    copies: Iterable[Copy], held: Mapping[NodeId, Sequence[Holding]], given_up: Iterable[RoundId]
) -> Holding | None:
    """The round to rebuild after a loss: the newest, if the arenas hold nothing as new.

    Args:
      copies: the good parts in the arenas of the nodes that live.
      held: the rounds that these nodes hold.
      given_up: rounds that some node could not rebuild.
    """
    there, beyond = _holders(held), set(given_up)
    found = max(
        (h for h in there if h.round not in beyond and usable(h, there[h])),
        key=lambda h: h.round,
        default=None,
    )
    newest = Inventory(copies=tuple(copies)).newest_complete()
    if found is None or (newest is not None and newest >= found.round.version):
        return None
    return found


def _holders(held: Mapping[NodeId, Sequence[Holding]]) -> dict[Holding, set[NodeId]]:
    found: dict[Holding, set[NodeId]] = {}
    for node, holdings in held.items():
        for holding in holdings:
            found.setdefault(holding, set()).add(node)
    return found


def choose(
    copies: Mapping[NodeId, Sequence[tuple[Copy, PartRef]]],
    now: Holding | None,
    code: Code,
    ballot: Ballot,
) -> list[StripeSet]:
    """What to make next, a set for each group; empty when there is nothing newer.

    All groups protect the same step: after a loss in two of them, only a step that both can
    rebuild is worth anything.

    Args:
      copies: the sealed parts on every node that lives, and where they lie.
      now: the round that stands.
      code: the code.
      ballot: the leader's.
    """
    every = [copy for found in copies.values() for copy, _ in found]
    newest = Inventory(copies=tuple(every)).newest_complete()
    if newest is None or (now is not None and newest <= now.round.version):
        return []
    generation, step = newest
    groups: Groups = deal(copies, code)
    return [
        StripeSet(
            round=RoundId(generation, step, ballot),
            code=code,
            groups=groups,
            parts={node: _parts(copies[node], generation, step) for node in group},
        )
        for group in groups
    ]


def _parts(
    copies: Sequence[tuple[Copy, PartRef]], generation: Generation, step: Step
) -> tuple[PartRef, ...]:
    """The parts that count for a snapshot (`Inventory.complete`), in a fixed order."""
    parts = (ref for c, ref in copies if c.step == step and c.generation >= generation)
    return tuple(sorted(parts, key=lambda p: (p.seat, p.generation)))
