"""Operations: what a node's byte server answers about its parity.

Each over an authenticated connection (`serve`)::

    {"op": "parity-state"}                        -> {"parts": [...], "holds": [...],
                                                      "given_up": [...], "promised": [n, node]}
    {"op": "parity-state", "ballot": [n, node]}   -> the same; that leader is obeyed from now on,
                                                     or "refused" says why not
    {"op": "parity-make", "set": {...}, "keep": [...] or null}
                                                  -> {"working": true} now and then, and last
                                                     {"made": [bytes, seconds]}
    {"op": "parity-keep", "round": [...]}         -> {"kept": true}
    {"op": "parity-head", "round": [...]}         -> {"bytes": n} n bytes
    {"op": "parity-data", "round": [...], "place": [stripe, shard], "at": 0, "bytes": n}
                                                  -> {"bytes": n} n bytes
"""

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftkit.checkpoint.parity.buffer import read_data, read_head, shard_spots
from ftkit.checkpoint.parity.combine import be_nice
from ftkit.checkpoint.parity.holder import Cost, Holder
from ftkit.checkpoint.parity.rounds import Ballot, Holding, PartRef, RoundId, StripeSet
from ftkit.checkpoint.serve import RANGE_BYTES_MAX, Operation, natural, send_bytes
from ftkit.checkpoint.stripes import Place
from ftkit.core.errors import FtkitError, IntegrityError, ProtocolError
from ftkit.core.inventory import Copy
from ftkit.core.wire import send_message

#: A leader that waits hears this often that there is still work going on.
WORKING_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeState:
    """What a node says of its parts and its parity."""

    promised: Ballot
    parts: tuple[tuple[Copy, PartRef], ...]
    """The sealed parts in its arenas, less those known to be damaged."""
    holds: tuple[Holding, ...]
    given_up: frozenset[RoundId]
    """Rounds that it tried to rebuild in vain."""
    refused: str = ""
    """Why the leader who asked is not obeyed."""

    def to_json(self) -> dict[str, object]:
        return {
            "promised": self.promised,
            "parts": [[copy.to_json(), part.to_json()] for copy, part in self.parts],
            "holds": [h.to_json() for h in self.holds],
            "given_up": list(self.given_up),
            "refused": self.refused,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "NodeState":
        """Read what `to_json` wrote. Raises ProtocolError on anything else."""
        try:
            return cls(
                promised=Ballot.from_json(value["promised"]),
                parts=tuple(
                    (Copy.from_json(copy), PartRef.from_json(part)) for copy, part in value["parts"]
                ),
                holds=tuple(map(Holding.from_json, value["holds"])),
                given_up=frozenset(map(RoundId.from_json, value["given_up"])),
                refused=str(value["refused"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not a node's parity: {value!r:.200}") from error


def operations(holder: Holder, state: Callable[[], NodeState]) -> dict[str, Operation]:
    """The operations of a node.

    Args:
      holder: of its parity.
      state: what it says of itself, at this moment.
    """

    def answer_state(sock: socket.socket, request: dict[str, Any]) -> None:
        refused = ""
        if "ballot" in request:
            refused = holder.ask(Ballot.from_json(request["ballot"]))
        # After the promise: what is said here no other leader changes any more.
        send_message(sock, state().to_json() | {"refused": refused})

    def make(sock: socket.socket, request: dict[str, Any]) -> None:
        stripes = StripeSet.from_json(request.get("set"))
        keep = request.get("keep")
        kept = None if keep is None else RoundId.from_json(keep)
        if holder.node not in stripes.parts:
            raise ProtocolError(f"node {holder.node} is not in the group")
        answer = list[Cost | Exception]()

        def work() -> None:
            try:
                be_nice()
                answer.append(holder.make(stripes, stripes.round.ballot, kept))
            except Exception as error:  # noqa: BLE001 - it is raised where it is awaited
                answer.append(error)

        worker = threading.Thread(target=work, name="ftkit-parity-make", daemon=True)
        worker.start()
        # Silence would mean to the leader that this node is gone.
        while not answer:
            worker.join(WORKING_S)
            if not answer:
                send_message(sock, {"working": True})
        match answer[0]:
            case Cost(count, seconds):
                send_message(sock, {"made": [count, seconds]})
            case FtkitError() as error:
                send_message(sock, {"error": str(error), "lost": isinstance(error, IntegrityError)})
            case error:
                send_message(sock, {"error": repr(error), "lost": False})

    def keep(sock: socket.socket, request: dict[str, Any]) -> None:
        round_ = RoundId.from_json(request.get("round"))
        holder.keep(Ballot.from_json(request.get("ballot")), round_)
        send_message(sock, {"kept": True})

    def head(sock: socket.socket, request: dict[str, Any]) -> None:
        path = holder.path_of(RoundId.from_json(request.get("round")))
        send_bytes(sock, memoryview(read_head(path)))

    def data(sock: socket.socket, request: dict[str, Any]) -> None:
        round_ = RoundId.from_json(request.get("round"))
        path, stripes = holder.path_of(round_), holder.stripes_of(round_)
        place = _place(request.get("place"))
        at, count = natural(request, "at"), natural(request, "bytes")
        spots = shard_spots(stripes, holder.node)
        if place not in spots:
            raise IntegrityError(f"node {holder.node} does not keep shard {place}")
        length = stripes.plan.stripes[place.stripe].length
        if count > RANGE_BYTES_MAX or at + count > length:
            raise ProtocolError(f"bytes {at} to {at + count} of a shard of {length}")
        send_bytes(sock, memoryview(read_data(path, spots[place][0] + at, count)))

    return {
        "parity-state": answer_state,
        "parity-make": make,
        "parity-keep": keep,
        "parity-head": head,
        "parity-data": data,
    }


def _place(value: object) -> Place:
    if not isinstance(value, list) or [type(v) for v in value] != [int, int]:
        raise ProtocolError(f"not a shard's place: {value!r:.80}")
    return Place(*value)
