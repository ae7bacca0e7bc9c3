"""Bundle: what was collected about one incident, as one paragraph. Pure.

`incident` is what the coordinator wrote: the verdicts, who waited, what was decided; `nodes` is
what each agent found on its node: stacks, processes, the newest collectives, pressure.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ftkit.core.verdict import Fault
from ftkit.detection.stacks import innermost, users

#: Pressure worth a word: a tenth of the last ten seconds somebody waited for it.
_PRESSURE_MIN = 0.1
#: Of other culprits so many are told of.
_ALSO_MAX = 3
#: What is said of every member of the job, in the same words.
_OF_ALL = frozenset({Fault.HANG_COMM, Fault.STALL})


def paragraph(incident: Mapping[str, Any], nodes: Sequence[Mapping[str, Any]]) -> str:
    """The story of one incident. What is missing is left out."""
    told = [f"Incident {incident.get('number', '?')}:"]
    verdicts = incident.get("verdicts") or []
    if verdicts:
        # What came of it says less: that a member which had to go is gone.
        first = verdicts[0]
        said = [v for v in verdicts if (v.get("seat"), v.get("fault")) == _what(first)]
        told.append(f"{'suspected ' if said[-1].get('suspected') else ''}{first.get('fault')}.")
        told.append(_sentence(str(said[-1].get("reason", ""))))
        told += _others(verdicts)
    culprits = {v.get("seat") for v in verdicts}
    for seat, text in _stacks(nodes):
        frames = innermost(text)
        if not frames:
            continue
        whose = f"Seat {seat}" if seat in culprits else f"Seat {seat}, which waits,"
        mine = users(frames)
        told.append(f"{whose} stands in {frames[0]}" + (f", called by {mine}." if mine else "."))
    for seat, process in _processes(nodes):
        if seat in culprits and process.get("state") in ("T", "t"):
            told.append(f"The process of seat {seat} is stopped: it has no stack to show.")
    told += [_sentence(words) for words in _differences(verdicts)]
    told += _pressures(nodes)
    told += [
        _sentence(f"Self-check: {found.get('said', '')}")
        for found in incident.get("self_checks") or []
    ]
    if decisions := [str(d.get("action")) for d in incident.get("decisions") or []]:
        told.append(f"Decided: {', '.join(dict.fromkeys(decisions))}.")
    return " ".join(told)


def waits(verdicts: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The waiting matrix as far as it is known: who waits for whom, since when, in what."""
    found: dict[tuple[Any, Any], dict[str, Any]] = {}
    for v in verdicts:
        for waiter in (v.get("evidence") or {}).get("waiters") or []:
            found[v.get("seat"), waiter.get("seat")] = {"for": v.get("seat"), **waiter}
    return list(found.values())


def _others(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was found of other culprits: of each what was said first, unless it came of that."""
    first = verdicts[0]
    if first.get("fault") in _OF_ALL:
        return []
    found: dict[Any, str] = {}
    for v in verdicts:
        ours = (v.get("evidence") or {}).get("ours")
        if v.get("seat") != first.get("seat") and not ours:
            reason = _sentence(str(v.get("reason", "")))
            found.setdefault(v.get("seat"), f"Also {v.get('fault')}: {reason}")
    told = list(found.values())
    more = len(told) - _ALSO_MAX
    return told[:_ALSO_MAX] + ([f"So with {more} more."] if more > 0 else [])


def _what(verdict: Mapping[str, Any]) -> tuple[Any, Any]:
    return verdict.get("seat"), verdict.get("fault")


def _stacks(nodes: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    return [
        (int(seat), str(found.get("text", "")))
        for node in nodes
        for seat, found in sorted((node.get("stacks") or {}).items())
    ]


def _processes(nodes: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    return [
        (int(seat), found)
        for node in nodes
        for seat, found in sorted((node.get("processes") or {}).items())
        if found
    ]


def _differences(verdicts: Iterable[Mapping[str, Any]]) -> list[str]:
    said = []
    for v in verdicts:
        evidence = v.get("evidence") or {}
        if "theirs" in evidence:
            ours, theirs = evidence.get("ours") or {}, evidence["theirs"] or {}
            said.append(f"seat {v.get('seat')} called {_call(ours)}, the others {_call(theirs)}")
    return said


def _call(call: Mapping[str, Any]) -> str:
    nbytes = call.get("nbytes")
    return f"{call.get('op')}" + (f" of {nbytes} bytes" if nbytes is not None else "")


def _pressures(nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    said = []
    for node in nodes:
        for what, share in (node.get("pressure") or {}).items():
            if isinstance(share, int | float) and share >= _PRESSURE_MIN:
                said.append(
                    f"On node {node.get('node', '?')} something waited for {what} for {100 * share:.0f} % "
                    "of the last ten seconds."
                )
    return said


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".")
    return f"{text[:1].upper()}{text[1:]}." if text else ""
