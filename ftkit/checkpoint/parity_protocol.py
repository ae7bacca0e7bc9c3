"""The parity protocol: when a snapshot's stripes count, and which may be overwritten (pure).

Rule 1: whatever decides this lives here. Rule 2: no I/O and no clock. `advance` takes the state
and one event, and returns the next state and the commands that follow. ::

    every node HOLDS it     every node has SENT     every node has ACKNOWLEDGED
    sealed -----> Encode ------------------> sent ----------------> Publish, Release older
                    |                          |
                    +---- a node is LOST, REFUSES, or the world is FORMED anew ----> Abandon

A node acknowledges a snapshot once, when it holds both its own sealed parts and all parity it
keeps of the others, digests checked. Nodes report what they hold as a level: said again at any
time, it needs no answer. All else names the snapshot it is about; what is about one that is not
on its way, an older generation's above all, changes nothing.

Invariants (tests/checkpoint checks them on every state it reaches):

* P1  From the first publication on there is a published snapshot, complete on every node of
      its own groups when it was published; nobody is told to release it before the next one is
      published. Losing nodes does not unpublish it: that is what it is for.
* P2  Only what all nodes acknowledged is published, and versions published only rise.
* P3  At most `SLOTS` snapshots are kept at once (published, and on their way): the parity slots
      that a node has. What would need one more waits; nothing blocks training.
* P4  What a rebuild reads is kept until that rebuild is done.
* P5  A snapshot that was abandoned is never published: some of its parity may be of data that
      is gone.
"""

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import TypeAlias, assert_never

from ftkit.checkpoint.parity_state import (
    Abandon,
    Acknowledged,
    BeyondRepair,
    Command,
    Encode,
    Event,
    Flight,
    Formed,
    Holds,
    Lost,
    ParityState,
    Publish,
    Published,
    Rebuild,
    RebuildWanted,
    Rebuilt,
    Refused,
    Release,
    Sent,
    Version,
)
from ftkit.checkpoint.slots import SLOTS
from ftkit.core.ids import NodeId

Moved: TypeAlias = tuple[ParityState, tuple[Command, ...]]


def advance(state: ParityState, event: Event) -> Moved:
    """The next state, and what to do. Every event is accepted in every state.

    Args:
      state: as `advance` or `resume` returned it.
      event: what happened, in the order it was learnt.
    """
    match event:
        case Formed():
            return _formed(state, event)
        case Holds(node, versions):
            if node not in state.nodes - state.gone:
                return state, ()
            return _begin(replace(state, held={**state.held, node: versions}))
        case Sent(node, version):
            flight = _flight(state, node, version)
            if flight is None:
                return state, ()
            return _put(state, replace(flight, sent=flight.sent | {node})), ()
        case Acknowledged(node, version):
            flight = _flight(state, node, version)
            return (state, ()) if flight is None else _acknowledged(state, flight, node)
        case Refused(node, version, reason):
            if _flight(state, node, version) is None:
                return state, ()
            dropped, commands = _abandon(state, f"node {node}: {reason}", {version})
            begun, more = _begin(dropped)
            return begun, (*commands, *more)
        case Lost(node):
            return _lost(state, node)
        case RebuildWanted():
            return _rebuild_wanted(state)
        case Rebuilt(version, lost):
            reading = state.rebuilding
            if reading is None or (reading.version, reading.lost) != (version, lost):
                return state, ()  # the answer to a command that another loss overtook
            return _release(state, replace(state, rebuilding=None))
        case _:
            assert_never(event)


def waits_for(state: ParityState) -> str:
    """Who keeps the oldest snapshot on its way from being published, for people; pure."""
    if not state.flights:
        return "no parity is being made"
    flight = state.flights[0]
    unsent = sorted(state.nodes - flight.sent - flight.acknowledged)
    silent = sorted(state.nodes - flight.acknowledged)
    what = f"nodes {unsent} to send" if unsent else f"nodes {silent} to acknowledge"
    return f"parity of step {flight.version[1]} waits for {what}"


def resume(world: Formed, reported: Iterable[Published]) -> Moved:
    """The state of a coordinator that takes over from one that died.

    Args:
      world: the present world.
      reported: every snapshot that some node has acknowledged and still keeps, with the groups
        it was made in; as `lost`, those of its nodes that do not say so.

    A node that acknowledged holds its own shards of every stripe, so m silent nodes of a group
    are made up for whether or not the dead coordinator said "published". Of those snapshots the
    one that misses fewest is taken, then the newest: one half made must not replace a whole one.
    """
    known = list(reported)
    usable = [p for p in known if not p.beyond]
    usable.sort(key=lambda p: (-len(p.lost), p.version))
    state = ParityState(
        generation=world.generation,
        groups=world.groups,
        m=world.m,
        done=max((p.version for p in known), default=None),
        published=usable[-1] if usable else None,
    )
    left = sorted({p.version for p in known} - state.kept)
    return state, tuple(Abandon(v, "its coordinator died") for v in left)


def _formed(state: ParityState, event: Formed) -> Moved:
    if event.generation <= state.generation:
        return state, ()
    reason = f"the world of generation {event.generation} was formed"
    cleared, commands = _abandon(state, reason, {f.version for f in state.flights})
    formed = replace(
        cleared,
        generation=event.generation,
        groups=event.groups,
        m=event.m,
        gone=frozenset(),
        held={},
    )
    return formed, commands


def _begin(state: ParityState) -> Moved:
    """Start on the newest snapshot that all nodes hold, if a slot is free (P3)."""
    if state.gone or not state.nodes or len(state.kept) >= SLOTS:
        return state, ()
    common = frozenset.intersection(*(state.held.get(n, frozenset()) for n in state.nodes))
    new = [v for v in common if state.done is None or v > state.done]
    # An older generation's may belong to a history that was given up.
    new = [v for v in new if v[0] == state.generation]
    if not new:
        return state, ()
    version = max(new)
    begun = replace(state, flights=(*state.flights, Flight(version)), done=version)
    return begun, (Encode(version),)


def _acknowledged(state: ParityState, flight: Flight, node: NodeId) -> Moved:
    flight = replace(flight, acknowledged=flight.acknowledged | {node})
    if flight.acknowledged != state.nodes:
        return _put(state, flight), ()
    # Whatever is older and still on its way would be worth nothing once it arrived.
    older = {f.version for f in state.flights if f.version < flight.version}
    reason = f"step {flight.version[1]} overtook it"
    cleared, dropped = _abandon(state, reason, older)
    published = replace(
        cleared,
        flights=tuple(f for f in cleared.flights if f.version != flight.version),
        published=Published(flight.version, state.groups, state.m),
    )
    released, commands = _release(cleared, published)
    return released, (Publish(flight.version), *dropped, *commands)


def _lost(state: ParityState, node: NodeId) -> Moved:
    commands: tuple[Command, ...] = ()
    if node in state.nodes - state.gone:
        state = replace(state, gone=state.gone | {node})
        every = {f.version for f in state.flights}
        state, commands = _abandon(state, f"node {node} is lost", every)
    if state.published is not None:
        state = replace(state, published=state.published.without(node))
    reading = state.rebuilding
    if reading is None or reading.without(node) == reading:
        return state, commands
    # A source of the rebuild, or its worker, is gone: what it had done is planned anew.
    again, more = _rebuild(state, reading.without(node))
    return again, (*commands, *more)


def _rebuild_wanted(state: ParityState) -> Moved:
    published = state.published
    if published is None:
        return state, (BeyondRepair("no snapshot has parity yet"),)
    if not published.lost or state.rebuilding == published:
        return state, ()  # nothing to do, or it is being done
    return _rebuild(state, published)


def _rebuild(state: ParityState, source: Published) -> Moved:
    if not source.beyond:
        moved, commands = _release(state, replace(state, rebuilding=source))
        return moved, (Rebuild(source.version, source.lost), *commands)
    moved, commands = _release(state, replace(state, rebuilding=None))
    reason = (
        f"parity of step {source.version[1]} makes up for {source.m} nodes of a group, and nodes "
        f"{source.beyond} are lost"
    )
    return moved, (BeyondRepair(reason), *commands)


def _flight(state: ParityState, node: NodeId, version: Version) -> Flight | None:
    """What a node's word about a snapshot is about; None when it is too late or from nobody."""
    if node not in state.nodes:
        return None
    return next((f for f in state.flights if f.version == version), None)


def _put(state: ParityState, flight: Flight) -> ParityState:
    return replace(
        state,
        flights=tuple(flight if f.version == flight.version else f for f in state.flights),
    )


def _abandon(state: ParityState, reason: str, versions: Collection[Version]) -> Moved:
    stay = tuple(f for f in state.flights if f.version not in versions)
    return replace(state, flights=stay), tuple(Abandon(v, reason) for v in sorted(versions))


def _release(before: ParityState, after: ParityState) -> Moved:
    """Tell of what is no longer kept, then use the slot that may have become free."""
    freed = tuple(Release(version) for version in sorted(before.kept - after.kept))
    begun, commands = _begin(after)
    return begun, (*freed, *commands)
