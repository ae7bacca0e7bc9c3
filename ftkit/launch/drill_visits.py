"""DrillVisits: an agent's part in drills of the job that it serves, asked for from outside.

A visitor asks how this node stands, and for a strike at what is on it. It is the agent that strikes:
it knows which processes are its own. It does so only if the job still is what the visitor saw, and
marks whom it strikes, so that no budget of failures and no history of nodes pays for a drill.
"""

import os
import platform
import shutil
import signal
import socket
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from typing import Any

from ftkit import __version__
from ftkit.core.errors import WireError
from ftkit.core.fault_plan import Kind
from ftkit.core.ids import MemberId, NodeId, Step
from ftkit.core.trace import Trace
from ftkit.core.wire import Line
from ftkit.launch.arenas import Arenas
from ftkit.launch.drill_faults import LIVE_FAULTS, LOSE_NODE, PREEMPT
from ftkit.launch.roster import Roster
from ftkit.recovery.plan import Mode, Plan

_SIGNALS = {Kind.KILL.value: signal.SIGKILL, Kind.STOP.value: signal.SIGSTOP}


def refusal(
    message: Mapping[str, Any], plan: Plan, here: Collection[MemberId], *, draining: bool
) -> str:
    """Why a strike that was asked for is not made; empty where it is. Pure.

    Args:
      message: the visitor's: `fault`, `members`, and the `order` of the plan that it rests on.
      plan: what this node knows.
      here: members on this node that train.
      draining: whether the node is about to be taken away.

    Raises:
      KeyError, TypeError, ValueError: it is no such message.
    """
    fault, members = str(message["fault"]), {MemberId(int(m)) for m in message["members"]}
    order = tuple(int(n) for n in message["order"])
    if fault not in LIVE_FAULTS:
        return f"there is no drill {fault!r} of a job that runs"
    if order != plan.order or plan.mode is not Mode.RUNNING or plan.world is None:
        return "the job has moved on since it was looked at"
    if draining:
        return "the node is about to be taken away"
    if not members or not members <= set(here) & plan.world.member_ids:
        return f"members {sorted(members)} do not train on this node"
    if fault in _SIGNALS and len(members) != 1:
        return f"{fault} strikes one rank, not {len(members)}"
    if fault not in _SIGNALS and members != set(here) & plan.world.member_ids:
        return "others train on this node, too"
    return ""


class DrillVisits:
    """Owned by the agent's thread; `receive` is called on those of visitors."""

    def __init__(
        self,
        node: NodeId,
        name: str,
        roster: Roster,
        arenas: Arenas,
        trace: Trace,
        *,
        put: Callable[[str, Any], None],
        drain: Callable[[], None],
        tell: Callable[[], None],
    ) -> None:
        """Of one agent.

        Args:
          node: which node this is.
          name: what it is called across jobs.
          roster: its ranks.
          arenas: what is lost with the node.
          trace: told of every strike.
          put: told ("visit", (line, message)), to be handed to `take` on the agent's thread.
          drain: the node is about to be taken away.
          tell: has the coordinator know what the roster knows.
        """
        self._node, self._name = node, name
        self._roster, self._arenas, self._trace = roster, arenas, trace
        self._put, self._drain, self._tell = put, drain, tell

    def receive(self, sock: socket.socket, _hello: Mapping[str, Any]) -> None:
        """(visitor's thread) Pass on what a visitor says until it hangs up."""
        line = Line(sock)
        try:
            while True:
                self._put("visit", (line, line.receive()))
        except WireError:
            line.close()

    def take(
        self, line: Line, message: Mapping[str, Any], plan: Plan, *, draining: bool, led: bool
    ) -> None:
        """Answer a visitor, and do what it asks for. `led`: whether a coordinator is heard of."""
        try:
            match message.get("type"):
                case "state":
                    line.send(self._state(plan, bool(message["plan"]), draining, led))
                case "strike":
                    self._strike(line, message, plan, draining)
                case "release":
                    member = MemberId(int(message["member"]))
                    self._roster.wake_drilled(member)
                    line.send({"type": "released"})
                case other:
                    line.send({"type": "refused", "reason": f"unknown message {other!r}"})
        except WireError:
            pass  # it hung up; what was begun goes on
        except (KeyError, TypeError, ValueError) as error:
            self._refuse(line, f"malformed message: {error!r}")

    def _state(self, plan: Plan, whole: bool, draining: bool, led: bool) -> dict[str, object]:
        steps = self._steps()
        return {
            "type": "state",
            "node": self._node,
            "name": self._name,
            "order": plan.order,
            # Every node has the same one, and it grows with the job.
            "plan": plan.to_json() if whole else None,
            "members": [
                f.to_json() | {"at_step": steps.get(f.member, f.at_step)}
                for f in self._roster.alive
            ],
            "draining": draining,
            "led": led,
            "versions": versions(),
        }

    def _steps(self) -> dict[MemberId, Step]:
        rows = self._arenas.rows(self._roster.alive)
        return {MemberId(r["row"]["member"]): Step(r["row"]["step"]) for r in rows}

    def _strike(self, line: Line, message: Mapping[str, Any], plan: Plan, draining: bool) -> None:
        here = [f.member for f in self._roster.alive]
        if reason := refusal(message, plan, here, draining=draining):
            self._refuse(line, reason)
            return
        fault = str(message["fault"])
        steps, seats = self._steps(), {f.member: f.seat for f in self._roster.alive}
        members = sorted(MemberId(int(m)) for m in message["members"])
        # Who stands by goes with its node.
        self._roster.drilled(members if fault in _SIGNALS else here)
        if fault == LOSE_NODE:
            self._tell()  # nobody can afterwards
        for member in members:
            self._trace.event(
                "drill", fault=fault, phase="any", seat=seats[member], member=member,
                step=steps.get(member), live=True,
            )  # fmt: skip
        if fault in _SIGNALS:
            self._roster.send_signal(members[0], _SIGNALS[fault])
        elif fault == PREEMPT:
            self._drain()
        else:
            # The answer first: nobody is left to give one.
            line.send({"type": "struck"})
            for member in here:
                self._roster.send_signal(member, signal.SIGKILL)
            shutil.rmtree(self._arenas.directory, ignore_errors=True)
            os.kill(os.getpid(), signal.SIGKILL)
        line.send({"type": "struck"})

    def _refuse(self, line: Line, reason: str) -> None:
        try:
            line.send({"type": "refused", "reason": reason})
        except WireError:
            pass  # it hung up


def versions() -> dict[str, str]:
    """Of what a job's survival depends on, as far as this interpreter can tell."""
    told = {"ftkit": __version__, "python": platform.python_version()}
    for name in ("torch", "ray"):
        try:
            told[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return told
