"""Histories of a small job, written out: 3 seats, 8 slots of 4 samples, 6 steps.

The disturbed one: member 1 (seat 1) is killed at 10.312 s in the backward of step 3, seen
24 ms later; the survivors commit step 3 in generation 2 after 180 ms; member 3 takes seat 1
and commits step 5 in generation 3.
"""

from typing import Any

Event = dict[str, Any]

SPLIT_3 = ([0, 1, 2], [3, 4, 5], [6, 7])
SPLIT_2 = ([0, 1, 2, 3], [4, 5, 6, 7])


def event(mono: float, kind: str, **fields: object) -> Event:
    return {"t": 1_700_000_000 + mono, "mono": round(mono, 6), "kind": kind} | fields


def votes(mono: float, step: int, generation: int, who: dict[int, int]) -> list[Event]:
    """One vote of each member; `who` maps seat to member."""
    split = {3: SPLIT_3, 2: SPLIT_2, 1: ([*range(8)],)}[len(who)]
    return [
        event(mono, "vote", seat=seat, member=member, step=step, generation=generation,
              slots=list(slots), data=f"s{step}:{slots[0]}-{slots[-1]}")
        for (seat, member), slots in zip(sorted(who.items()), split, strict=True)
    ]  # fmt: skip


def commits(mono: float, step: int, generation: int, who: dict[int, int]) -> list[Event]:
    return [
        event(mono, "commit", seat=seat, member=member, step=step, generation=generation,
              loss=5.0 - step / 4)
        for seat, member in sorted(who.items())
    ]  # fmt: skip


def attempt(mono: float, step: int, generation: int, who: dict[int, int]) -> list[Event]:
    return votes(mono, step, generation, who) + commits(mono + 0.005, step, generation, who)


FULL = {0: 0, 1: 1, 2: 2}
TWO = {0: 0, 2: 2}
HEALED = {0: 0, 1: 3, 2: 2}


def undisturbed() -> list[Event]:
    events = []
    for seat, member in FULL.items():
        events.append(event(8.0, "spawn", seat=seat, member=member, pid=100 + seat, reason="start"))
        events.append(event(10.0, "admit", seat=seat, member=member, generation=1, step=0))
    for step in range(1, 7):
        events += attempt(10 + step / 10, step, 1, FULL)
    for seat, member in FULL.items():
        events.append(event(11, "final", seat=seat, member=member, params="aa11", loss=3.5))
        events.append(event(11.1, "exit", seat=seat, member=member, code=0, signal=None))
    return [*events, event(11.2, "end", outcome="completed", reason="6 steps")]


def disturbed() -> list[Event]:
    events = []
    for seat, member in FULL.items():
        events.append(event(8.0, "spawn", seat=seat, member=member, pid=100 + seat, reason="start"))
        events.append(event(10.0, "admit", seat=seat, member=member, generation=1, step=0))
    events += attempt(10.1, 1, 1, FULL) + attempt(10.2, 2, 1, FULL)
    events += [
        event(10.312, "drill", fault="kill", phase="backward", seat=1, member=1, step=3),
        event(10.320, "exit", seat=1, member=1, code=None, signal=9),
        event(10.336, "verdict", fault="exited", member=1, seat=1, reason="killed by SIGKILL",
              evidence={"signal": 9}, since_s=10.312),
        event(10.340, "halt", generation=1, reason="member 1 exited"),
        event(10.341, "rollback", seat=0, member=0, step=3),
        event(10.342, "rollback", seat=2, member=2, step=3),
        event(10.343, "decision", action="shrink", reason="two survivors hold step 2"),
        event(10.350, "resume", generation=2, step=2, members=[0, 2]),
    ]  # fmt: skip
    events += votes(10.480, 3, 2, TWO) + commits(10.492, 3, 2, TWO)
    events.append(event(10.35, "spawn", seat=1, member=3, pid=200, reason="seat 1 was lost"))
    events += attempt(10.6, 4, 2, TWO)
    events.append(event(10.65, "admit", seat=1, member=3, generation=3, step=4))
    events.append(event(10.66, "resume", generation=3, step=4, members=[0, 1, 2]))
    events += attempt(10.7, 5, 3, HEALED) + attempt(10.8, 6, 3, HEALED)
    for seat, member in HEALED.items():
        events.append(event(11, "final", seat=seat, member=member, params="aa11", loss=3.5))
        events.append(event(11.1, "exit", seat=seat, member=member, code=0, signal=None))
    return [*events, event(11.2, "end", outcome="completed", reason="6 steps")]
