"""Offers: messages of ours that peers of this host read from our memory.

The address goes out; the peer reads when its receive is posted (`peer_memory`), and says so.
Only then is the ticket done and our memory free, unless what was offered is a staged copy.
Owned by the communication thread.
"""

from collections.abc import Sequence

from ftkit.collectives import frames
from ftkit.collectives.arithmetic import Bytes, copy
from ftkit.collectives.config import CollectivesConfig
from ftkit.collectives.frames import OFFER_BYTES, Kind, Offer
from ftkit.collectives.keys import Key, header_of
from ftkit.collectives.link import Ticket
from ftkit.collectives.linkset import LinkSet
from ftkit.collectives.resident import Place, find
from ftkit.collectives.staging import Staging
from ftkit.core.ids import MemberId


class Offers:
    """See the module."""

    def __init__(self, member: MemberId, config: CollectivesConfig, links: LinkSet) -> None:
        """Nothing is offered; staging memory is taken as it is needed."""
        self._member = member
        self._links = links
        self._bytes_min = config.cma_bytes_min
        self._open: dict[Key, Ticket] = {}
        self._staging = Staging(config.piece_bytes, config.staging_bytes_max // config.piece_bytes)

    def wanted(self, peer: MemberId, nbytes: int) -> bool:
        """Whether a message of `nbytes` to `peer` is to be offered, not sent."""
        link = self._links.links.get(peer)
        return link is not None and link.can_offer and nbytes >= self._bytes_min

    def make(self, key: Key, data: Bytes, ticket: Ticket) -> None:
        """Offer `data` as it lies; it must stay until the ticket is done."""
        self._send(key, _offer_of(data, find(data.ctypes.data, data.size)), ticket)

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
            self._send(key, offer, tickets[reader] if told else None)
        return tickets, loan is not None

    def _send(self, key: Key, offer: Offer, ticket: Ticket | None) -> None:
        link = self._links.living(MemberId(key.peer))
        if ticket is not None:
            link.awaited += 1
            self._open[key] = ticket
        header = header_of(key, self._member, Kind.OFFER, OFFER_BYTES)
        self._links.queue(link, header, memoryview(frames.pack_offer(offer)))

    def acknowledged(self, key: Key) -> bool:
        """The peer has read the message; False when nobody waits to hear of it."""
        ticket = self._open.pop(key, None)
        if ticket is None:
            return False
        ticket.complete()
        return True

    @property
    def lent(self) -> bool:
        """Whether peers may still be reading staged copies of operations that have ended."""
        return self._staging.lent

    def end(self) -> None:
        """The generation is over: nothing that was offered holds any more."""
        self._open.clear()
        self._staging.recall()

    def close(self) -> None:
        """Give staging memory back."""
        self._staging.close()


def _offer_of(data: Bytes, place: Place | None) -> Offer:
    if place is None:
        return Offer(data.ctypes.data, data.size)
    return Offer(data.ctypes.data, data.size, place.fd, place.serial, place.offset)
