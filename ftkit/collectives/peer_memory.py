"""PeerMemory: what peers of this host offer, read where it lies.

Resident memory is mapped and read in place, private memory is fetched by the kernel. Neither
asks for the owner's help, so neither knows whether the bytes still are what was offered: that
is looked up in the owner's valid word *after* the read (see `cma`), by `acknowledge`. Owned by
the communication thread.
"""

import numpy as np

from ftkit.collectives.arithmetic import Bytes, copy
from ftkit.collectives.cma import CmaPeer, ProcessGoneError
from ftkit.collectives.faults import DoubtError, FaultError
from ftkit.collectives.frames import Kind, Offer
from ftkit.collectives.keys import Key, header_of
from ftkit.collectives.linkset import LinkSet
from ftkit.collectives.resident import Place
from ftkit.core.errors import WireError
from ftkit.core.ids import Generation, MemberId


class PeerMemory:
    """See the module. All methods raise FaultError when the peer is gone."""

    def __init__(self, member: MemberId, links: LinkSet, cma_bytes_min: int) -> None:
        """Read the peers of `links` for `member`; messages below `cma_bytes_min` are sent."""
        self.generation = Generation(0)
        """Offers of no other one hold."""
        self._member = member
        self._links = links
        self._bytes_min = cma_bytes_min

    def can_read(self, peer: MemberId, nbytes: int) -> bool:
        """Whether a message of `nbytes` from `peer` comes as an offer."""
        link = self._links.links.get(peer)
        return link is not None and link.cma is not None and nbytes >= self._bytes_min

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
                self._links.living(peer), header_of(key, self._member, Kind.ACK, 0), memoryview(b"")
            )

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
