"""Incident: what happened to the job and what was done about it, told from its event stream.

Pure. Events are the dicts of `core.trace`, in order of time; whatever is missing is left out of
the story, and nothing that is missing is guessed.

An incident opens with a verdict that removes somebody, a process that ends badly, or a halt. It
takes in everything until training resumes and the first step after it is committed, and later
echoes about the members it was about.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from ftkit.core.verdict import EVICT, Fault

_EVICTING: Final = {str(fault) for fault in EVICT}
Event = Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class Culprit:
    """One member and what was said of it. Unknown is None."""

    member: int
    seat: int | None = None
    fault: str | None = None
    reason: str | None = None
    phase: str | None = None
    step: int | None = None
    op: str | None = None
    """The collective it stood in, when it did."""
    waiters: list[dict[str, Any]] = field(default_factory=list)
    since: float | None = None
    code: int | None = None
    signal: int | None = None


@dataclass(slots=True, kw_only=True)
class Incident:
    """One disturbance of the job. Times are those of the events (`mono`, else `t`), seconds."""

    drill: str | None = None
    """The fault that was put in on purpose."""
    began: float | None = None
    """When the fault began: the drill, else what the first verdict believes, else its exit."""
    detected: float | None = None
    """When the first verdict, or the exit, was written."""
    generation: int | None = None
    culprits: list[Culprit] = field(default_factory=list)
    reported: list[str] = field(default_factory=list)
    """Verdicts for which nobody is removed, as "fault: reason"."""
    halt_reason: str | None = None
    standings: list[dict[str, Any]] = field(default_factory=list)
    """What survivors said when halted: seat, step, phase."""
    decisions: list[dict[str, Any]] = field(default_factory=list)
    spawned: list[int] = field(default_factory=list)
    """Seats for which a process was started."""
    resumed: float | None = None
    rebuilds: list[str] = field(default_factory=list)
    """What was computed anew from parity, or could not be."""
    resumed_generation: int | None = None
    resumed_step: int | None = None
    resumed_members: int | None = None
    committed: float | None = None
    """When the first step after it was committed."""
    committed_step: int | None = None

    @property
    def detect_s(self) -> float | None:
        """From fault to verdict."""
        return _between(self.began, self.detected)

    @property
    def repair_s(self) -> float | None:
        """From fault to training again: the first commit, or the resumption without one."""
        return _between(self.began, self.resumed if self.committed is None else self.committed)

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"detect_s": self.detect_s, "repair_s": self.repair_s}


def explain(events: Iterable[Event]) -> str:
    """The story of a run, one paragraph for each incident."""
    events = list(events)
    found = incidents(events)
    if found:
        return "\n\n".join(_paragraph(incident) for incident in found)
    steps = [e["step"] for e in events if e.get("kind") == "commit" and "step" in e]
    reached = f"; {max(steps)} is the last step committed" if steps else ""
    return f"No incident in {len(events)} events{reached}."


def incidents(events: Iterable[Event]) -> list[Incident]:
    """The incidents of a run, in order."""
    found: list[Incident] = []
    drill: Event | None = None
    for event in events:
        kind = event.get("kind")
        last = found[-1] if found else None
        if kind == "drill":
            drill = event
            continue
        if _opens(event, last):
            last = Incident(generation=event.get("generation"))
            if drill is not None:
                last.drill, last.began = drill.get("fault"), _time(drill)
                drill = None
            found.append(last)
        if last is not None:
            _take(last, event)
    return found


def _opens(event: Event, last: Incident | None) -> bool:
    """Whether this event is trouble, and not part of the incident before."""
    match event.get("kind"):
        case "verdict":
            trouble = True
        case "exit":
            trouble = _bad_exit(event)
        case "halt":
            trouble = True
        case _:
            trouble = False
    if not trouble or last is None:
        return trouble
    if last.resumed is None and last.resumed_generation is None:
        return False
    about = event.get("member")
    if about is not None and any(c.member == about for c in last.culprits):
        return False  # the killed process of an evicted member is reaped late, or said again
    told, now = event.get("generation"), last.resumed_generation
    return told is None or now is None or told >= now


def _take(incident: Incident, event: Event) -> None:
    match event.get("kind"):
        case "verdict":
            _take_verdict(incident, event)
        case "exit" if _bad_exit(event):
            _take_exit(incident, event)
        case "halt":
            incident.halt_reason = incident.halt_reason or event.get("reason")
        case "report" if incident.resumed_generation is None:
            incident.standings.append(
                {k: event[k] for k in ("seat", "step", "phase") if k in event}
            )
        case "decision":
            told = {k: event.get(k) for k in ("action", "reason", "generation", "step", "members")}
            if costs := event.get("costs"):
                told["costs"] = costs.get("reason")
            if told not in incident.decisions:
                incident.decisions.append(told)
        case "spawn" if incident.committed is None:
            seat = event.get("seat")
            if seat is not None and seat not in incident.spawned:
                incident.spawned.append(seat)
        case "rebuild" | "rebuild-failed":
            incident.rebuilds.append(_rebuilt(event))
        case "resume":
            incident.resumed = _time(event)
            incident.resumed_generation = event.get("generation", -1)
            incident.resumed_step = event.get("step")
            incident.resumed_members = _how_many(event.get("members"))
            incident.committed = incident.committed_step = None
        case "commit" if incident.resumed_generation is not None:
            now = event.get("generation")
            if incident.committed is None and (now is None or now >= incident.resumed_generation):
                incident.committed, incident.committed_step = _time(event), event.get("step")


def _rebuilt(event: Event) -> str:
    where, step = f"node {event.get('node', '?')}", event.get("step", "?")
    if event.get("kind") == "rebuild-failed":
        return f"{where} could not rebuild step {step} from parity: {event.get('reason')}"
    text = f"{where} rebuilt {event.get('bytes', 0)} bytes of step {step} from parity"
    text += f" in {event.get('seconds', 0.0):.2f} s"
    if damaged := event.get("damaged"):
        text += f"; lost or corrupt were {'; '.join(damaged)}"
    return text


def _take_verdict(incident: Incident, event: Event) -> None:
    fault, reason = str(event.get("fault", "unknown")), event.get("reason")
    if fault not in _EVICTING or event.get("member") is None:
        said = f"{fault}: {reason}" if reason else fault
        if said.partition(":")[0] not in {s.partition(":")[0] for s in incident.reported}:
            incident.reported.append(said)
        _begin(incident, event.get("since_s"), _time(event))
        return
    culprit = _culprit(incident, event)
    if culprit.fault not in (None, Fault.EXITED) or culprit.reason is not None:
        return  # said again: levels, not edges
    evidence = event.get("evidence") or {}
    culprit.fault, culprit.reason, culprit.since = fault, reason, event.get("since_s")
    culprit.phase, culprit.step = evidence.get("phase"), evidence.get("step")
    if evidence.get("in_collective"):
        culprit.op = f"{evidence.get('op')} {evidence.get('left', -1) + 1}"
    culprit.waiters = list(evidence.get("waiters") or [])
    culprit.code = evidence.get("code", culprit.code)
    culprit.signal = evidence.get("signal", culprit.signal)
    _begin(incident, culprit.since, _time(event))


def _take_exit(incident: Incident, event: Event) -> None:
    if event.get("member") is None:
        return
    culprit = _culprit(incident, event)
    if culprit.fault is None:
        culprit.fault = str(Fault.EXITED)
        culprit.code, culprit.signal = event.get("code"), event.get("signal")
        culprit.since = _time(event)
        _begin(incident, culprit.since, culprit.since)


def _culprit(incident: Incident, event: Event) -> Culprit:
    member = int(event["member"])
    for culprit in incident.culprits:
        if culprit.member == member:
            return culprit
    culprit = Culprit(member=member, seat=event.get("seat"))
    incident.culprits.append(culprit)
    return culprit


def _begin(incident: Incident, since: float | None, told: float | None) -> None:
    if incident.began is None:
        incident.began = since if since is not None else told
    if incident.detected is None:
        incident.detected = told


def _paragraph(incident: Incident) -> str:
    told: list[str] = []
    if incident.drill:
        told.append(f"In a drill of {incident.drill},")
    told += [_about(culprit) for culprit in incident.culprits]
    if not incident.culprits:
        told.append("Nobody was named.")
    told += [f"It was reported as {said.rstrip('.')}." for said in incident.reported]
    if incident.halt_reason:
        told.append(f"The job was halted: {incident.halt_reason.rstrip('.')}.")
    if incident.standings:
        told.append(f"The others stood in {_places(incident.standings)}.")
    told += [_decided(decision) for decision in incident.decisions]
    if incident.spawned:
        seats = ", ".join(str(seat) for seat in incident.spawned)
        told.append(f"A new process was started for seat {seats}.")
    told += [f"{said[0].upper()}{said[1:].rstrip('.')}." for said in incident.rebuilds]
    told.append(_end(incident))
    text = " ".join(told)
    return text[0].upper() + text[1:]


def _about(culprit: Culprit) -> str:
    who = f"member {culprit.member}"
    if culprit.seat is not None:
        who = f"seat {culprit.seat} ({who})"
    text = f"{who} was found {culprit.fault}"
    if culprit.signal is not None:
        text += f" by signal {culprit.signal}"
    elif culprit.code is not None:
        text += f" with code {culprit.code}"
    if culprit.phase is not None:
        text += f"; it stood in {culprit.phase}"
        text += f" of step {culprit.step}" if culprit.step is not None else ""
    if culprit.op:
        text += f", in {culprit.op}"
    if culprit.waiters:
        first = culprit.waiters[0]
        seats = ", ".join(str(w.get("seat", "?")) for w in culprit.waiters)
        text += f", and seats {seats} waited for it"
        if first.get("op"):
            seq = f" {first['seq']}" if first.get("seq") is not None else ""
            text += f" in {first['op']}{seq}"
        if first.get("waited_s") is not None:
            text += f", the first for {first['waited_s']:.1f} s"
    return text + "."


def _places(standings: Sequence[Mapping[str, Any]]) -> str:
    seats: dict[str, list[str]] = {}
    for told in standings:
        place = f"{told.get('phase') or 'a phase unknown'} of step {told.get('step', '?')}"
        seats.setdefault(place, []).append(str(told.get("seat", "?")))
    return "; ".join(f"{place} (seats {', '.join(s)})" for place, s in seats.items())


#: What the protocol's actions mean to a reader; others are told by their own name.
_ACTIONS: Final[Mapping[str, str]] = {
    "halt": "to have every rank stand still",
    "assign": "to start ranks",
    "evict": "to end what stood in the way",
    "respawn": "to replace the process",
    "resume": "to go on",
    "form": "to form a world",
    "reform": "to begin again from snapshots",
    "restart": "to start over",
    "wait": "to wait for the replacement",
    "go-on": "not to wait for the replacement",
    "join": "to offer a grown world",
    "grown": "to let them in",
    "withdraw": "to withdraw that offer",
    "end": "to end the job",
}


def _decided(decision: Mapping[str, Any]) -> str:
    action = decision.get("action")
    text = f"It was decided {_ACTIONS.get(str(action), 'to ' + str(action or 'act'))}"
    if decision.get("step") is not None:
        text += f" from step {decision['step']}"
    many = _how_many(decision.get("members"))
    if many is not None:
        text += f" with {many} members"
    if decision["reason"]:
        text += f", because {decision['reason'].rstrip('.')}"
    if decision.get("costs"):
        text += f" ({decision['costs']})"
    return f"{text}."


def _end(incident: Incident) -> str:
    if incident.resumed_generation is None:
        return "Training has not resumed."
    text = "Training resumed"
    if incident.resumed_step is not None:
        text += f" after step {incident.resumed_step}"
    if incident.resumed_members is not None:
        text += f" with {incident.resumed_members} members"
    if incident.resumed_generation >= 0:
        text += f" in generation {incident.resumed_generation}"
    if incident.committed_step is not None:
        text += f" and committed step {incident.committed_step}"
    if incident.repair_s is not None:
        text += f", {incident.repair_s:.2f} s after the fault"
        if incident.detect_s is not None:
            text += f" ({incident.detect_s:.2f} s of them to detect it)"
    return text + "."


def _bad_exit(event: Event) -> bool:
    return event.get("signal") is not None or event.get("code") not in (0, None)


def _how_many(members: object) -> int | None:
    if isinstance(members, int):
        return members
    return len(members) if isinstance(members, list | tuple) else None


def _time(event: Event) -> float | None:
    value = event.get("mono", event.get("t"))
    return None if value is None else float(value)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else max(0.0, end - start)
