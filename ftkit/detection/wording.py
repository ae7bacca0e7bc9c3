"""The sentence and the evidence of a verdict: who waited, for what, and where the member stood."""

import signal
from collections.abc import Sequence
from typing import Final

from ftkit.core.ids import Seat
from ftkit.core.verdict import EVICT, Fault, Verdict
from ftkit.detection.observations import Exited
from ftkit.detection.track import Track

#: Of ten thousand waiters, these say as much as all.
_WAITERS_MAX: Final = 8

_DOING: Final = {
    Fault.STOPPED: "is stopped",
    Fault.HANG_BUSY: "is busy without progress",
    Fault.HANG_BLOCKED: "is blocked",
}


_SIGNALS: Final = {
    "SIGSEGV": "it touched memory that is not its own",
    "SIGBUS": "memory behind a mapping is gone, as when shared memory or a disk is full",
    "SIGABRT": "it gave up: a failed check in native code, often with a message above",
    "SIGFPE": "an impossible operation, such as a division by zero in native code",
    "SIGILL": "an instruction that this processor does not have",
    "SIGKILL": "somebody killed it, and it is not known that memory was short",
    "SIGTERM": "somebody asked it to end",
}


def where(one: Track) -> str:
    """Where a member stands, in words."""
    row = one.row
    place = f"{row.phase} of step {row.step}"
    return f"{place}, in {_pending(one)}" if one.in_collective else place


def hang_reason(
    fault: Fault, one: Track, waiters: Sequence[Track], *, stalled_s: float, limit_s: float
) -> str:
    """Why a member is a suspect."""
    first = min(waiters, key=lambda w: w.waits_since or 0.0)
    return (
        f"seat {one.seat} (member {one.member}, pid {one.row.pid}) {_DOING[fault]} in {where(one)}, "
        f"without progress for {one.at - one.progress_at:.1f} s; {_count(len(waiters))} for it "
        f"{_for_what(first)}, for {stalled_s:.1f} s of at most {limit_s:.1f} s"
    )


def suspicion(verdict: Verdict, *, removed_s: float) -> str:
    """The reason of a verdict that is only a suspicion yet."""
    if verdict.fault not in EVICT:
        return verdict.reason
    return f"{verdict.reason}; suspected, and convicted after {removed_s:.1f} s"


def comm_reason(
    members: Sequence[Track],
    silent: Sequence[tuple[Seat, Seat]],
    *,
    stalled_s: float,
    limit_s: float,
) -> str:
    """Why communication is at fault, and between whom, as far as that is known."""
    paths = ", ".join(f"from seat {a} to seat {b}" for a, b in silent[:3])
    places = sorted({_for_what(m) for m in members})
    return (
        f"all {len(members)} members wait {' or '.join(places[:3])} and nobody left it for "
        f"{stalled_s:.1f} s of at most {limit_s:.1f} s, though all of them run: the communication "
        "between them hangs" + (f"; no bytes come {paths}" if paths else "")
    )


def desync_reason(one: Track, waiters: Sequence[Track]) -> str:
    """Why the ranks are said to disagree."""
    if not one.in_collective:
        return (
            f"seat {one.seat} (member {one.member}) has ended its training after step "
            f"{one.row.step} while {_count(len(waiters))} {_for_what(waiters[0])}: "
            "the script's ranks disagree on how much there is to do"
        )
    others = sorted({w.row.op for w in waiters if w.row.op != one.row.op})
    return (
        f"seat {one.seat} (member {one.member}) waits in {_pending(one)} where others wait in "
        f"{' and '.join(others)}: the script's ranks call different collectives"
    )


def stall_reason(one: Track, *, idle_s: float, limit_s: float) -> str:
    """Why the job is said to stand still."""
    return (
        f"nothing in the job moves for {idle_s:.1f} s, over the {limit_s:.1f} s allowed, and "
        f"nobody can be named for it; seat {one.seat} (member {one.member}) stands in {where(one)}"
    )


def exit_reason(exited: Exited) -> str:
    """How a member ended."""
    if exited.out_of_memory:
        how = f"ran out of memory: {exited.out_of_memory}"
    elif exited.ours:
        how = "was killed by ftkit itself, for a reason given before"
    elif exited.signal is not None:
        how = f"was killed by signal {exited.signal}{signal_meaning(exited.signal)}"
    elif exited.code is not None:
        how = f"exited with code {exited.code}"
    else:
        how = "is gone, and nobody can know how it ended"
    return f"seat {exited.seat} (member {exited.member}) {how}"


def signal_meaning(number: int) -> str:
    """The signal's name and what it usually means, in parentheses; "" for one without a name."""
    try:
        name = signal.Signals(number).name
    except ValueError:
        return ""
    meaning = _SIGNALS.get(name)
    return f" ({name}: {meaning})" if meaning else f" ({name})"


def evidence(one: Track) -> dict[str, object]:
    """Where `one` stood, JSON-safe."""
    row, facts = one.row, one.facts
    found: dict[str, object] = {
        "generation": row.generation,
        "pid": row.pid,
        "step": row.step,
        "phase": str(row.phase),
        "op": row.op,
        "group": row.group,
        "entered": row.entered,
        "left": row.left,
        "in_collective": one.in_collective,
        "idle_s": _round(one.at - one.progress_at),
        "seen_at_s": _round(one.at),
        "heartbeat_age_s": _round(one.heartbeat_age_s),
    }
    if facts is not None:
        found |= {
            "state": facts.state,
            "cpu_ticks": facts.cpu_ticks,
            "rss_bytes": facts.rss_bytes,
            "wchan": facts.wchan,
            "syscall": facts.syscall,
        }
    return found


def waiting(waiters: Sequence[Track]) -> dict[str, object]:
    """Who waits, since when and where, JSON-safe: the eight that have waited longest."""
    longest = sorted(waiters, key=lambda w: (w.waits_since or 0.0, w.seat))
    return {
        "waiting": len(waiters),
        "waiters": [
            {
                "member": w.member,
                "seat": w.seat,
                "since_s": _round(w.waits_since),
                "waited_s": _round(w.at - (w.waits_since or w.at)),
                "step": w.row.step,
                "phase": str(w.row.phase),
                "op": w.row.op if w.in_collective else str(w.row.phase),
                "group": w.row.group,
                "seq": w.row.left + 1 if w.in_collective else None,
            }
            for w in longest[:_WAITERS_MAX]
        ],
    }


def _for_what(waiter: Track) -> str:
    if waiter.in_collective:
        return f"in {_pending(waiter)}"
    return f"in the {waiter.row.phase} of step {waiter.row.step}"


def _pending(one: Track) -> str:
    group, seq = one.pending
    direction, _, peer = one.row.op.partition(" ")
    if direction in ("send", "recv"):
        return f"{direction} {'to' if direction == 'send' else 'from'} member {peer}"
    return f"{one.row.op or 'a collective'} {seq} of group {group}"


def _count(waiters: int) -> str:
    return "1 member waits" if waiters == 1 else f"{waiters} members wait"


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
