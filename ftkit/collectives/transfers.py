"""Transfers: messages between members, over links or by reading memory.

Operations ask for `send` and `post` and get tickets; frames come in through `place` and
`arrived`. The two meet in the mailbox. Owned by the communication thread.

A message to a peer that can read our memory, and large enough, is an *offer*: its address
goes out, the peer fetches it when its receive is posted, makes sure that it still held, and
acknowledges; only then is our ticket done and our memory free. The peer reads resident memory
in place; of private memory we may `lend` a staged copy, so that ours is free at once.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ftkit.collectives import frames
from ftkit.collectives.arithmetic import Bytes, copy, view_of
from ftkit.collectives.cma import CmaPeer, ProcessGoneError
from ftkit.collectives.config import CollectivesConfig
from ftkit.collectives.faults import DoubtError, FaultError
from ftkit.collectives.frames import OFFER_BYTES, P2P, Header, Kind, Offer
from ftkit.collectives.link import Link, Ticket
from ftkit.collectives.linkset import LinkSet
from ftkit.collectives.mailbox import Inbound, Mailbox
from ftkit.collectives.op import Key, Op, empty
from ftkit.collectives.resident import Place, find
from ftkit.collectives.staging import Staging
from ftkit.core.errors import ProtocolError, WireError
from ftkit.core.ids import Generation, MemberId

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
        self.generation = Generation(0)
        self._member = member
        self._config = config
        self._links = links
        self._is_over = is_over
        self._on_control = on_control
        self._mail = Mailbox()
        self._offers: dict[Key, Ticket] = {}
        self._staging = Staging(config.piece_bytes, config.staging_bytes_max // config.piece_bytes)
        self._pulls: deque[_Pull] = deque()
        self._anybody: deque[tuple[Op, Ticket]] = deque()
        self._scratch: list[Bytes] = []
        self._void = np.empty(config.segment_bytes, dtype=np.uint8)

    # -- for operations -------------------------------------------------------------------

    def pulls(self, peer: MemberId, nbytes: int) -> bool:
        link = self._links.links.get(peer)
        return link is not None and link.cma is not None and nbytes >= self._config.cma_bytes_min

    def offers(self, peer: MemberId, nbytes: int) -> bool:
        link = self._links.links.get(peer)
        return link is not None and link.can_offer and nbytes >= self._config.cma_bytes_min

    def send(self, key: Key, data: Bytes) -> Ticket:
        """Send a message, as an offer or through the socket."""
        ticket = Ticket()
        if key.peer == self._member:
            self._to_self(key, data)
            ticket.complete()
            return ticket
        link = self._links.living(MemberId(key.peer))
        view = view_of(data)
        if self.offers(link.peer, data.size):
            place = find(data.ctypes.data, data.size)
            self._offer(key, _offer_of(data, place), ticket)
        else:
            self._links.queue(
                link,
                _header(key, self._member, Kind.DATA, data.size),
                view,
                ticket,
                urgent=data.size <= self._config.exchange_bytes_max,
            )
        return ticket

    def lend(
        self, keys: Sequence[Key], data: Bytes, *, told: bool, copied: bool = False
    ) -> tuple[list[Ticket], bool]:
        """Offer `data`, at most a piece, to peers that can read us: staged, if private.

        Args:
          keys: one a peer.
          data: read now, if it is staged.
          told: whether the peers are to tell us when they have read, by a message each. What
            is neither resident nor staged is always told.
          copied: whether `data` changes at once, so that even resident memory is staged.

        Returns:
          What is told: a ticket a key, or none. And whether the peers read a copy; what they
          read in place must stay until they have told us of it, or of a later piece.
        """
        loan = None
        place = None if copied else find(data.ctypes.data, data.size)
        if place is None:
            loan = self._staging.lend(len(keys))
            if loan is None:
                told = True
                if copied:
                    data = data.copy()
            else:
                shown = loan.block.memory[: data.size]
                copy(shown, data)
                data, place = shown, find(shown.ctypes.data, shown.size)
        offer = _offer_of(data, place)._replace(acknowledge=told)
        tickets = [Ticket() for _ in keys] if told else []
        for ticket in tickets:
            ticket.data = data  # a copy that nobody else holds, perhaps
        for reader, key in enumerate(keys):
            if loan is not None and place is not None:
                at = place.offset + loan.receipt_offset(reader)
                offer = offer._replace(receipt=loan.number, receipt_offset=at)
            self._offer(key, offer, tickets[reader] if told else None)
        return tickets, loan is not None

    def _offer(self, key: Key, offer: Offer, ticket: Ticket | None) -> None:
        link = self._links.living(MemberId(key.peer))
        if ticket is not None:
            link.awaited += 1
            self._offers[key] = ticket
        header = _header(key, self._member, Kind.OFFER, OFFER_BYTES)
        self._links.queue(link, header, memoryview(frames.pack_offer(offer)))

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

    def look(self, peer: MemberId, offer: Offer) -> Bytes | None:
        """What `peer` offered, in its own memory; None when it must be fetched."""
        view = self._mapped(peer, offer)
        fuse = self._links.fuse
        if view is not None and fuse.lit:
            fuse.burn(view.size)
        return view

    def _mapped(self, peer: MemberId, offer: Offer) -> Bytes | None:
        if offer.fd < 0:
            return None
        place = Place(offer.fd, offer.serial, offer.offset)
        return self._reader(peer).mapped.view(place, offer.length)

    def fetch(self, peer: MemberId, offer: Offer, at: int, into: Bytes) -> None:
        """Read offered memory, from byte `at`. Ends the generation when the peer is gone."""
        fuse = self._links.fuse
        if fuse.lit:
            short = fuse.first(into)
            self._fetch(peer, offer, at, short)
            fuse.burn(short.size)
        self._fetch(peer, offer, at, into)

    def _fetch(self, peer: MemberId, offer: Offer, at: int, into: Bytes) -> None:
        view = self._mapped(peer, offer)
        if view is not None:
            copy(into, view[at : at + into.size])
            return
        try:
            self._reader(peer).read(into.ctypes.data, offer.address + at, into.size)
        except ProcessGoneError as error:
            raise FaultError(f"member {peer} is gone: {error}", frozenset({peer})) from error
        except WireError as error:
            raise DoubtError(f"member {peer} unmapped what it offered: {error}") from error

    def acknowledge(self, key: Key, offer: Offer) -> None:
        """Check that what was read still held, then let the offerer go on."""
        peer = MemberId(key.peer)
        self._check_held(peer)
        if offer.receipt:
            place = Place(offer.fd, offer.serial, offer.receipt_offset)
            slot = self._reader(peer).mapped.view(place, 8)
            if slot is not None:
                slot.view(np.uint64)[0] = offer.receipt
        if offer.acknowledge:
            self._links.queue(
                self._links.living(peer), _header(key, self._member, Kind.ACK, 0), memoryview(b"")
            )

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
    def lent(self) -> bool:
        """Whether peers may still be reading staged copies of operations that have ended."""
        return self._staging.lent

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
        self._offers.clear()
        self._staging.recall()
        self._anybody.clear()
        self.purge(generation)
        for link in self._links.links.values():
            link.awaited = 0
            link.drop_output(generation)
            link.discard_input(generation)
            self._links.unpark(link)

    def close(self) -> None:
        """Give staging memory back."""
        self._staging.close()

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
        key = _key_of(header)
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
                ticket = self._offers.pop(_key_of(header), None)
                if ticket is not None:
                    link.awaited -= 1
                    ticket.complete()
            case _:
                self._on_control(link, header, view)

    def _data_arrived(self, link: Link, header: Header, inbound: Inbound) -> None:
        inbound.got += header.length
        if not inbound.complete:
            return
        key = _key_of(header)
        if inbound.ticket is not None and self._mail.posted.pop(key, None) is not None:
            link.awaited -= 1
            _checked(lambda: inbound.deliver(key))

    def _offer_arrived(self, link: Link, header: Header, view: memoryview) -> None:
        if self._is_over(header.generation):
            return
        key = _key_of(header)
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
        self.fetch(peer, pull.offer, pull.at, pull.into[pull.at : end])
        if pull.into.size > end:
            self._pulls.append(pull._replace(at=end))
            return
        self.acknowledge(pull.key, pull.offer)
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

    def _reader(self, peer: MemberId) -> CmaPeer:
        cma = self._links.living(peer).cma
        if cma is None:
            raise FaultError(f"member {peer} offered memory that we cannot read")
        return cma

    def _check_held(self, peer: MemberId) -> None:
        try:
            held = self._reader(peer).holds(self.generation)
        except ProcessGoneError as error:
            raise FaultError(f"member {peer} is gone: {error}", frozenset({peer})) from error
        except WireError as error:
            raise DoubtError(f"member {peer} can no longer be read: {error}") from error
        if not held:
            raise DoubtError(f"member {peer} withdrew its memory: its generation is over")


def _checked(action: Callable[[], None]) -> None:
    try:
        action()
    except ProtocolError as error:
        # The stream is in frame; it is the ranks that disagree.
        raise FaultError(str(error)) from error


def _offer_of(data: Bytes, place: Place | None) -> Offer:
    if place is None:
        return Offer(data.ctypes.data, data.size)
    return Offer(data.ctypes.data, data.size, place.fd, place.serial, place.offset)


def _may_take(op: Op, key: Key) -> bool:
    """Whether a receive from anybody may take this message, if it is its sender's next."""
    return bool(
        key.flags & P2P
        and (key.generation, key.group, key.tag) == (op.generation, op.channel.id, op.tag)
        and MemberId(key.peer) in op.members
    )


def _key_of(header: Header) -> Key:
    return Key(
        header.generation,
        header.source,
        header.group,
        header.seq,
        header.tag,
        header.part,
        header.flags,
    )


def _header(key: Key, member: MemberId, kind: Kind, total: int) -> Header:
    return Header(
        kind,
        key.flags,
        key.group,
        key.generation,
        key.seq,
        key.tag,
        key.part,
        member,
        0,
        total,
        total,
    )
