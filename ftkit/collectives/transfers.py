"""Transfers: messages between members, over links or by reading memory.

Operations ask for `send` and `post` and get tickets; frames come in through `place` and
`arrived`. The two meet in the mailbox. Owned by the communication thread.

A message to a peer that can read our memory, and large enough, goes as an offer (`offers`),
which the peer fetches when its receive is posted (`peer_memory`).
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ftkit.collectives import frames
from ftkit.collectives.arithmetic import Bytes, copy, view_of
from ftkit.collectives.config import CollectivesConfig
from ftkit.collectives.faults import FaultError
from ftkit.collectives.frames import P2P, Header, Kind, Offer
from ftkit.collectives.keys import Key, header_of, key_of
from ftkit.collectives.link import Link, Ticket
from ftkit.collectives.linkset import LinkSet
from ftkit.collectives.mailbox import Inbound, Mailbox
from ftkit.collectives.offers import Offers
from ftkit.collectives.op import Op, empty
from ftkit.collectives.peer_memory import PeerMemory
from ftkit.core.errors import ProtocolError
from ftkit.core.ids import MemberId

_SCRATCH_MAX = 32


class _Pull(NamedTuple):
    """An offered message being fetched on behalf of a posted receive."""

    key: Key
    offer: Offer
    at: int
    """How much of it is here."""
    into: Bytes
    ticket: Ticket


class Transfers:
    """See the module."""

    def __init__(
        self,
        member: MemberId,
        config: CollectivesConfig,
        links: LinkSet,
        is_over: Callable[[int], bool],
        on_control: Callable[[Link, Header, memoryview], None],
    ) -> None:
        """Start in generation 0.

        Args:
          member: who we are.
          config: sizes.
          links: the way to the others.
          is_over: whether messages of a generation are to be dropped.
          on_control: takes the frames that belong to no operation.
        """
        self.memory = PeerMemory(member, links, config.cma_bytes_min)
        self.offers = Offers(member, config, links)
        self._member = member
        self._config = config
        self._links = links
        self._is_over = is_over
        self._on_control = on_control
        self._mail = Mailbox()
        self._pulls: deque[_Pull] = deque()
        self._anybody: deque[tuple[Op, Ticket]] = deque()
        self._scratch: list[Bytes] = []
        self._void = np.empty(config.segment_bytes, dtype=np.uint8)

    # -- for operations -------------------------------------------------------------------

    def send(self, key: Key, data: Bytes) -> Ticket:
        """Send a message, as an offer or through the socket."""
        ticket = Ticket()
        if key.peer == self._member:
            self._to_self(key, data)
            ticket.complete()
            return ticket
        link = self._links.living(MemberId(key.peer))
        view = view_of(data)
        if self.offers.wanted(link.peer, data.size):
            self.offers.make(key, data, ticket)
        else:
            self._links.queue(
                link,
                header_of(key, self._member, Kind.DATA, data.size),
                view,
                ticket,
                urgent=data.size <= self._config.exchange_bytes_max,
            )
        return ticket

    def post(self, key: Key, into: Bytes | None, *, raw: bool) -> Ticket:
        """Await a message. `raw` awaits an offer and does not fetch it."""
        ticket = Ticket()
        if self._anybody:
            self._claim(key._replace(seq=key.seq + 1))
        inbound = self._mail.early.pop(key, None)
        if inbound is None:
            if key.peer != self._member:
                link = self._links.living(MemberId(key.peer))
                link.awaited += 1
                self._links.unpark(link)
            inbound = Inbound()
            inbound.ticket, inbound.data, inbound.raw = ticket, into, raw
            self._mail.posted[key] = inbound
            return ticket
        known = self._links.links.get(MemberId(key.peer))
        if known is not None:
            known.early_bytes -= inbound.early_bytes
        inbound.ticket, inbound.raw = ticket, raw
        if inbound.offer is not None:
            if known is not None:
                known.awaited += 1
            inbound.data = into
            self._take_offer(key, inbound)
            return ticket
        inbound.target = into
        if inbound.complete:
            inbound.deliver(key)
            return ticket
        link = self._links.living(MemberId(key.peer))
        link.awaited += 1
        self._mail.posted[key] = inbound
        self._links.unpark(link)
        return ticket

    def take_scratch(self) -> Bytes:
        return (
            self._scratch.pop()
            if self._scratch
            else empty(max(self._config.segment_bytes, self._config.piece_bytes))
        )

    def give_scratch(self, *buffers: Bytes) -> None:
        if len(self._scratch) < _SCRATCH_MAX:
            self._scratch.extend(buffers)

    def from_anybody(self, op: Op) -> Ticket:
        """The first unclaimed p2p message with the tag of `op`: `ticket.data` is its Key."""
        ticket = Ticket()
        self._anybody.append((op, ticket))
        for key in [key for key in self._mail.early if _may_take(op, key)]:
            self._claim(key)
            if ticket.done:
                return ticket
        for member in op.members:
            link = self._links.links.get(member)
            if link is not None:
                self._links.unpark(link)
        return ticket

    # -- for the engine ---------------------------------------------------------------------

    @property
    def fetching(self) -> bool:
        """Whether offered messages wait to be fetched."""
        return bool(self._pulls)

    def awaited_of(self, op: Op) -> list[int]:
        """Members from whom `op` still waits for a message."""
        return sorted(
            {k.peer for k in self._mail.posted if (k.group, k.seq) == (op.channel.id, op.seq)}
        )

    def end(self, generation: int) -> None:
        """Forget all messages of `generation` and older, and the memory they would fill."""
        self._pulls.clear()
        self.offers.end()
        self._anybody.clear()
        self.purge(generation)
        for link in self._links.links.values():
            link.awaited = 0
            link.drop_output(generation)
            link.discard_input(generation)
            self._links.unpark(link)

    def purge(self, generation: int) -> None:
        """Forget what came early for `generation` and older."""
        for key, inbound in self._mail.purge(generation):
            link = self._links.links.get(MemberId(key.peer))
            if link is not None:
                link.early_bytes -= inbound.early_bytes

    # -- incoming frames (Router) -------------------------------------------------------------

    def place(self, link: Link, header: Header) -> tuple[memoryview, object] | None:
        if header.kind is not Kind.DATA:
            return memoryview(bytearray(header.length)), None
        if self._is_over(header.generation):
            return view_of(self._void)[: header.length], None
        link = link.root
        key = key_of(header)
        inbound = self._mail.find(key)
        if inbound is None:
            crowded = link.early_bytes + header.total > self._config.early_bytes_max
            if crowded and not link.awaited and not link.force and not self._anybody:
                return None
            inbound = Inbound()
            inbound.total = header.total
            self._mail.early[key] = inbound
            link.early_bytes += inbound.early_bytes
            self._claim(key)
        if not inbound.started:
            _checked(lambda: inbound.begin(key, header.total))
        assert inbound.data is not None, "a message that began has memory"
        if header.total != inbound.total:
            raise ProtocolError(f"segments of {header.total} and {inbound.total} bytes mixed")
        end = header.offset + header.length
        return view_of(inbound.data)[header.offset : end], inbound

    def arrived(self, link: Link, header: Header, view: memoryview, token: object) -> None:
        match header.kind:
            case Kind.DATA:
                if isinstance(token, Inbound):
                    self._data_arrived(link.root, header, token)
            case Kind.OFFER:
                self._offer_arrived(link, header, view)
            case Kind.ACK:
                if self.offers.acknowledged(key_of(header)):
                    link.awaited -= 1
            case _:
                self._on_control(link, header, view)

    def _data_arrived(self, link: Link, header: Header, inbound: Inbound) -> None:
        inbound.got += header.length
        if not inbound.complete:
            return
        key = key_of(header)
        if inbound.ticket is not None and self._mail.posted.pop(key, None) is not None:
            link.awaited -= 1
            _checked(lambda: inbound.deliver(key))

    def _offer_arrived(self, link: Link, header: Header, view: memoryview) -> None:
        if self._is_over(header.generation):
            return
        key = key_of(header)
        inbound = self._mail.posted.get(key)
        offer = frames.parse_offer(view)
        if inbound is None:
            inbound = Inbound()
            inbound.offer = offer
            self._mail.early[key] = inbound
            self._claim(key)
            return
        inbound.offer = offer
        self._take_offer(key, inbound)

    def _take_offer(self, key: Key, inbound: Inbound) -> None:
        """An offer met its receive: hand it over, or fetch it."""
        self._mail.posted.pop(key, None)
        link = self._links.living(MemberId(key.peer))
        link.awaited -= 1
        ticket, offer = inbound.ticket, inbound.offer
        assert ticket is not None, "only a posted message is taken"
        assert offer is not None, "an offer has an address"
        if inbound.raw:
            ticket.data = offer
            ticket.complete()
            return
        _checked(lambda: inbound.begin(key, offer.length))
        assert inbound.data is not None, "a message that began has memory"
        ticket.data = inbound.data
        self._pulls.append(_Pull(key, offer, 0, inbound.data, ticket))

    def fetch_segment(self) -> None:
        """Fetch one segment of one offered message. Raises FaultError and DoubtError."""
        pull = self._pulls.popleft()
        peer = MemberId(pull.key.peer)
        end = pull.at + self._config.piece_bytes
        self.memory.fetch(peer, pull.offer, pull.at, pull.into[pull.at : end])
        if pull.into.size > end:
            self._pulls.append(pull._replace(at=end))
            return
        self.memory.acknowledge(pull.key, pull.offer)
        pull.ticket.complete()

    def _claim(self, key: Key) -> None:
        """Give an early p2p message, and those that follow it, to who receives from anybody."""
        while key.flags & P2P and key in self._mail.early and self._give(key):
            # A small message overtakes a large one, and waits here for its turn.
            key = key._replace(seq=key.seq + 1)

    def _give(self, key: Key) -> bool:
        for op, ticket in self._anybody:
            if not _may_take(op, key):
                continue
            rank = op.members.index(MemberId(key.peer))
            if op.channel.take_from(rank, key.tag, key.seq):
                self._anybody.remove((op, ticket))
                op.seq, op.handle.source = key.seq, rank
                ticket.complete()
                return True
        return False

    def _to_self(self, key: Key, data: Bytes) -> None:
        inbound = self._mail.posted.pop(key, None)
        if inbound is None:
            inbound = Inbound()
            inbound.begin(key, data.size)
            self._mail.early[key] = inbound
            self._claim(key)
        else:
            _checked(lambda: inbound.begin(key, data.size))
        assert inbound.data is not None, "a message that began has memory"
        copy(inbound.data, data)
        inbound.got = data.size
        if inbound.ticket is not None:
            _checked(lambda: inbound.deliver(key))


def _checked(action: Callable[[], None]) -> None:
    try:
        action()
    except ProtocolError as error:
        # The stream is in frame; it is the ranks that disagree.
        raise FaultError(str(error)) from error


def _may_take(op: Op, key: Key) -> bool:
    """Whether a receive from anybody may take this message, if it is its sender's next."""
    return bool(
        key.flags & P2P
        and (key.generation, key.group, key.tag) == (op.generation, op.channel.id, op.tag)
        and MemberId(key.peer) in op.members
    )
