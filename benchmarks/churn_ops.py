"""Operations of the churn soak: each issues one collective and knows what must come out.

What a rank brings is a function of its rank, the size of the world and a salt that names the
round; so every rank can compute every result, and each is compared to the last bit. Sums are
of small integers, exact in any order, except for the canonical sum, whose order is fixed.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ftkit.collectives import moves
from ftkit.collectives.arithmetic import as_bytes
from ftkit.collectives.channel import Channel
from ftkit.collectives.group import Group
from ftkit.collectives.handle import Handle
from ftkit.collectives.slot_tree import SlotTree
from ftkit.collectives.slots import assign

SLOTS = 8
#: Elements of a tensor: none, one, odd ones, more than a segment.
COUNTS = (0, 1, 7, 1000, 4097, 65_537, 300_001, 1_200_003)
DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bfloat16)


class Issued(NamedTuple):
    """One operation in flight, and what to ask of its result."""

    name: str
    handle: Handle[Any]
    check: Callable[[], str]
    """Called once the handle is done: what is wrong, or ""."""


class Place(NamedTuple):
    """Where an operation takes place. All ranks of `channel` make the same ones."""

    group: Group
    channel: Channel
    rank: int
    size: int


def brought(rank: int, count: int, dtype: torch.dtype, salt: int) -> torch.Tensor:
    """What `rank` brings: small integers, so that sums of six are exact in any dtype."""
    return ((torch.arange(count) * 7 + rank * 5 + salt) % 11).to(dtype)


def all_reduce(at: Place, rng: random.Random, salt: int) -> Issued:
    """On the world: any dtype, sum, min or max."""
    count, dtype = rng.choice(COUNTS), rng.choice(DTYPES)
    op = rng.choice(("sum", "min", "max"))
    out = brought(at.rank, count, dtype, salt)
    handle = at.group.all_reduce(out, op)

    def check() -> str:
        parts = torch.stack([brought(r, count, torch.int64, salt) for r in range(at.size)])
        wanted = {"sum": parts.sum(0), "min": parts.amin(0), "max": parts.amax(0)}[op].to(dtype)
        return _differs(out, wanted)

    return Issued(f"all_reduce {op} {dtype} {count}", handle, check)


def reduce_scatter(at: Place, rng: random.Random, salt: int) -> Issued:
    """On the world."""
    count = rng.choice(COUNTS)
    ins = [brought(at.rank, count, torch.float32, salt + target) for target in range(at.size)]
    out = torch.empty(count)
    handle = at.group.reduce_scatter(out, ins)

    def check() -> str:
        parts = [brought(r, count, torch.float32, salt + at.rank) for r in range(at.size)]
        return _differs(out, torch.stack(parts).sum(0))

    return Issued(f"reduce_scatter {count}", handle, check)


def reduce_slots(at: Place, rng: random.Random, salt: int) -> Issued:
    """The canonical sum, of values whose order of summing shows."""
    count = rng.choice(COUNTS[1:])
    tree = SlotTree(SLOTS)
    for slot in assign(SLOTS, at.size)[at.rank]:
        tree.push(slot, _gradient(slot, count, salt))
    out = torch.empty(count)
    handle = at.group.reduce_slots(tree.nodes, out, slots=SLOTS, scale=1 / SLOTS)

    def check() -> str:
        alone = SlotTree(SLOTS)
        for slot in range(SLOTS):
            alone.push(slot, _gradient(slot, count, salt))
        (root,) = alone.nodes
        return _differs(out, root.value * (1 / SLOTS))

    return Issued(f"reduce_slots {count}", handle, check)


def all_gather(at: Place, rng: random.Random, salt: int) -> Issued:
    """On any channel; ranks bring different amounts."""
    count = rng.choice(COUNTS)
    outs = [torch.empty(count + r, dtype=torch.int32) for r in range(at.size)]
    mine = brought(at.rank, count + at.rank, torch.int32, salt)
    program = moves.all_gather([as_bytes(t) for t in outs], as_bytes(mine))
    handle = at.channel.issue("all_gather", program, nbytes=mine.nbytes)

    def check() -> str:
        wanted = [brought(r, count + r, torch.int32, salt) for r in range(at.size)]
        return _first(_differs(a, b) for a, b in zip(outs, wanted, strict=True))

    return Issued(f"all_gather {count}", _keeping(handle, mine), check)


def broadcast(at: Place, rng: random.Random, salt: int) -> Issued:
    """On any channel, from any root."""
    count, root = rng.choice(COUNTS), rng.randrange(at.size)
    tensor = brought(at.rank, count, torch.float32, salt)
    program = moves.broadcast(as_bytes(tensor), root)
    handle = at.channel.issue("broadcast", program, nbytes=tensor.nbytes)

    def check() -> str:
        return _differs(tensor, brought(root, count, torch.float32, salt))

    return Issued(f"broadcast {count} from {root}", handle, check)


def all_to_all(at: Place, rng: random.Random, salt: int) -> Issued:
    """On any channel; amounts differ by pair."""
    count = rng.choice(COUNTS)

    def piece(source: int, target: int) -> torch.Tensor:
        return brought(source, count // at.size + target, torch.int64, salt + target)

    ins = [piece(at.rank, target) for target in range(at.size)]
    outs = [torch.empty_like(piece(source, at.rank)) for source in range(at.size)]
    program = moves.all_to_all([as_bytes(t) for t in outs], [as_bytes(t) for t in ins])
    handle = at.channel.issue("all_to_all", program, nbytes=0)

    def check() -> str:
        return _first(_differs(out, piece(s, at.rank)) for s, out in enumerate(outs))

    return Issued(f"all_to_all {count}", _keeping(handle, ins), check)


def around(at: Place, rng: random.Random, salt: int) -> Issued:
    """Send to the next rank, receive from the one before."""
    count, tag = rng.choice(COUNTS), rng.randrange(3)
    after, before = (at.rank + 1) % at.size, (at.rank - 1) % at.size
    mine = brought(at.rank, count, torch.float32, salt)
    came = torch.empty(count)
    sent = at.channel.issue_p2p("send", after, tag, moves.send(as_bytes(mine), after), nbytes=0)
    handle = at.channel.issue_p2p("recv", before, tag, moves.recv(as_bytes(came), before), nbytes=0)

    def check() -> str:
        sent.wait(60)
        return _differs(came, brought(before, count, torch.float32, salt))

    return Issued(f"send and recv {count}", _keeping(handle, mine), check)


def exchange(at: Place, rng: random.Random, salt: int) -> Issued:
    """On any channel; what the votes use."""

    def said(rank: int) -> bytes:
        return bytes([(salt + rank) % 256]) * (rank * 3 + salt % 50)

    program = moves.exchange(np.frombuffer(said(at.rank), dtype=np.uint8))
    handle = at.channel.issue("exchange", program, nbytes=0)

    def check() -> str:
        wanted = [said(r) for r in range(at.size)]
        return "" if handle.wait(0) == wanted else "other bytes than were said"

    return Issued("exchange", handle, check)


Operation = Callable[[Place, random.Random, int], Issued]
#: On the world alone.
OF_THE_WORLD: Sequence[Operation] = (all_reduce, reduce_scatter, reduce_slots)
#: On any set of ranks.
ANYWHERE: Sequence[Operation] = (all_gather, broadcast, all_to_all, around, exchange)


def _gradient(slot: int, count: int, salt: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(salt * 100 + slot)
    return torch.randn(count, generator=generator) * 10.0 ** (slot % 5)


def _keeping(handle: Handle[Any], *memory: object) -> Handle[Any]:
    """`handle`, which keeps what it reads from alive."""
    handle.add_done_callback(lambda _, kept=memory: None)  # type: ignore[misc]
    return handle


def _differs(out: torch.Tensor, wanted: torch.Tensor) -> str:
    if torch.equal(out, wanted):
        return ""
    wrong = (out != wanted).nonzero().flatten()
    at = int(wrong[0])
    return (
        f"{wrong.numel()} of {out.numel()} elements are wrong, the first at {at}: "
        f"{out[at].item()}, not {wanted[at].item()}"
    )


def _first(found: Any) -> str:
    return next((text for text in found if text), "")
