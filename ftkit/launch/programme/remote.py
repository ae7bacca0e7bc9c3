"""Remote: asks the agents of a job that runs, and has them strike. Over sockets, with the job's key."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftkit.core.errors import FtkitError, ProtocolError, WireError
from ftkit.core.ids import MemberId, NodeId
from ftkit.core.wire import Line, connect
from ftkit.launch.drill_access import DrillAccess
from ftkit.launch.event_tail import EventTail
from ftkit.launch.programme.job_state import JobState, NodeState, OpenAccusations
from ftkit.launch.programme.targets import Target

#: An agent answers within a tick of its loop; longer than this, and it is as good as gone.
ANSWER_S = 5.0
#: Agents that are asked at the same time.
AT_ONCE = 32

NO_ADDRESS = (
    "its agent has written no address into the run's folder, which on several machines has to be on a "
    "file system that they share"
)


class Remote:
    """Of one job. One thread's object; agents are asked on threads of its own."""

    def __init__(self, run_dir: Path, access: DrillAccess) -> None:
        """Reach no one yet. `access` is the job's."""
        self._access = access
        self._key = bytes.fromhex(access.key)
        self._agents = EventTail(run_dir, files="agent-*.jsonl")
        self._coordinators = EventTail(run_dir, files="coordinator-*.jsonl")
        self._addresses: dict[NodeId, tuple[str, int]] = {}
        self._lines: dict[NodeId, Line] = {}
        self._accusations = OpenAccusations()
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="ftkit-ask")

    @property
    def one_host(self) -> bool:
        """Whether all agents are on one machine, so that their monotonic clocks are one."""
        return len({host for host, _ in self._addresses.values()}) <= 1

    def look(self) -> JobState:
        """Ask every agent how it stands. Blocks until each has answered, or `ANSWER_S` are over."""
        for event in self._agents.poll():
            if event["kind"] == "board" and "port" in event:
                self._addresses[NodeId(int(event["node"]))] = event["host"], int(event["port"])
        self._accusations.feed(self._coordinators.poll())
        nodes, silent = dict[NodeId, NodeState](), dict[NodeId, str]()
        first = min(self._addresses, default=None)
        asked = {
            n: self._pool.submit(self._ask, n, {"type": "state", "plan": n == first})
            for n in self._addresses
        }
        for node, answer in asked.items():
            try:
                nodes[node] = NodeState.from_json(answer.result())
            except FtkitError as error:
                silent[node] = str(error)
        missing = {NodeId(n) for n in range(self._access.nodes)} - self._addresses.keys()
        silent.update(dict.fromkeys(missing, NO_ADDRESS))
        if first in silent and nodes:
            # Somebody has to tell the plan.
            other = min(nodes)
            try:
                told = self._ask(other, {"type": "state", "plan": True})
                nodes[other] = NodeState.from_json(told)
            except FtkitError as error:
                silent[other] = str(error)
        state = JobState(seats=self._access.seats, nodes=nodes, silent=silent)
        return replace(state, accusations=self._accusations.of(state.members))

    def strike(self, target: Target) -> str:
        """Have it struck. Returns why it was refused; empty when it was not.

        A connection that breaks while the answer is awaited says nothing: it may have been struck,
        and is taken for that.
        """
        message = {
            "type": "strike",
            "fault": target.fault,
            "members": list(target.members),
            "order": list(target.order),
        }
        line = self._lines.get(target.node)
        if line is None:
            return f"node {target.node} is not connected"
        try:
            line.send(message)
        except WireError as error:
            self._hang_up(target.node)
            return f"node {target.node} cannot be asked: {error}"
        try:
            answer = line.receive()
        except WireError:
            self._hang_up(target.node)
            return ""
        return "" if answer.get("type") == "struck" else str(answer.get("reason") or answer)

    def release(self, target: Target) -> None:
        """Wake whom a strike has stopped, if somebody still can."""
        for member in target.members:
            try:
                self._ask(target.node, {"type": "release", "member": MemberId(member)})
            except FtkitError:
                continue  # its agent is gone, and it with it

    def close(self) -> None:
        """Hang up. The job goes on."""
        self._pool.shutdown(cancel_futures=True)
        for node in list(self._lines):
            self._hang_up(node)

    def _ask(self, node: NodeId, message: Mapping[str, object]) -> dict[str, Any]:
        """(pool's threads, one a node at a time) An agent's answer. Raises WireError."""
        line = self._lines.get(node)
        if line is None:
            line = connect(
                self._addresses[node],
                self._key,
                hello={"role": "drill"},
                timeout_s=ANSWER_S,
                visitor=True,
            )
            line.answer_within(ANSWER_S)
            if line.hello.get("node") != node:
                line.close()
                raise ProtocolError(f"another node answers: {line.hello.get('node')!r}")
            self._lines[node] = line
        try:
            line.send(message)
            return line.receive()
        except WireError:
            # What comes later would be taken for the answer to something else.
            self._hang_up(node)
            raise

    def _hang_up(self, node: NodeId) -> None:
        if line := self._lines.pop(node, None):
            line.close()
