"""Agent: one on each node. Starts ranks, sees them end, owns what outlives them.

It decides nothing. It carries out the newest plan (start the members its seats name, end
those that must go) and reports facts, all of them, at every change and every tick. One
thread does everything; others only wait for something and put it into its queue.
"""

import logging
import os
import queue
import secrets
import socket
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ftkit.core.clock import MonotonicClock
from ftkit.core.errors import FtkitError, ProtocolError, WireError
from ftkit.core.ids import Boot, MemberId, NodeId
from ftkit.core.trace import Trace
from ftkit.core.wall_clock import wall_clock
from ftkit.core.wire import Line
from ftkit.detection.signals import to_json
from ftkit.detection.status import BOARD
from ftkit.launch.arenas import Arenas
from ftkit.launch.config import JobConfig
from ftkit.launch.door import Door
from ftkit.launch.drill_access import drill_key
from ftkit.launch.drill_visits import DrillVisits
from ftkit.launch.environment import common_environment, rank_environment
from ftkit.launch.examiner import Examiner
from ftkit.launch.fork_server import Program
from ftkit.launch.forking import ForkServer, State
from ftkit.launch.job_preflight import JobPreflight
from ftkit.launch.metrics import Metrics, MetricsServer
from ftkit.launch.pace import STILL_S, Pace
from ftkit.launch.prober import REACH, Prober
from ftkit.launch.prober import ROLE as PAIR_TEST
from ftkit.launch.ranks import execute
from ftkit.launch.resources import CLOCK_S, Resources, state_bytes
from ftkit.launch.roster import Roster
from ftkit.launch.self_checker import SelfChecker
from ftkit.launch.tiers import Tiers
from ftkit.recovery.between import between_worlds
from ftkit.recovery.facts import Stage
from ftkit.recovery.plan import Assignment, Mode, Plan, Stop

logger = logging.getLogger(__name__)

#: A coordinator asks for the time more often than this.
BLIND_S = 3 * CLOCK_S

#: What a machine is called across jobs, where its host name is not the right name: in a pod.
NAME_VARIABLE = "FTKIT_NODE_NAME"

#: The longest a replacement is held back in favour of the survivors' repair.
SPAWN_LATEST_S = 0.5
#: By then a world that those who are left can form is formed.
FORMED_S = 0.05

#: The longest that ranks are held back for the fork server to have imported torch.
PRELOAD_LATEST_S = 30.0


#: The longest that a node which is about to be taken away waits for its ranks to leave.
DRAIN_S = 20.0
#: Once the world of the job has gone on without any rank of the node for so long, its spares, who
#: would never leave by themselves, are ended. Those who were in it leave on their own.
LEAVE_S = 1.0
STANDS_BY = frozenset({Stage.STARTING, Stage.READY, Stage.LINKED})

#: For so long after they have left, others may still read what they captured last.
LINGER_S = 1.0

#: For so long after a member was halted what it called before is told: they may have differed.
HALTED_S = 1.0


#: Of each seat so many collectives are kept of an incident.
RECORDS_KEPT = 32


class Agent:
    """The agent of one node. `run` is its life, on the thread that calls it."""

    def __init__(
        self,
        config: JobConfig,
        node: NodeId,
        secret: str,
        *,
        host: str,
        port: int = 0,
        inherited: Mapping[str, str] = os.environ,
    ) -> None:
        """Make the node's shared memory and listen; start nothing yet.

        Args:
          config: the job.
          node: this node's number.
          secret: the job's secret in hexadecimal.
          host: the address this node is reached at, by ranks and coordinator alike.
          port: the port for coordinators; another is taken where it is not free, or 0.
          inherited: the environment that ranks get ftkit's variables added to.

        Raises:
          OSError: the run directory cannot be written.
          CapacityError: shared memory is full.
        """
        self._config = config
        self._node = node
        self._secret = bytes.fromhex(secret)
        self._host = host
        self._name = node_name(config, node, host, inherited)
        self._inherited = inherited
        self._clock = MonotonicClock()
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        # The port first: when it is taken, nothing must be left in shared memory.
        self._door = Door(host, port)
        try:
            self._arenas = Arenas(config, node)
        except (FtkitError, OSError):
            self._door.close()
            raise
        self.trace = Trace(Path(config.run_dir) / "events" / f"agent-{node}.jsonl", node=node)
        # Viewers on this host read there what ranks do now; it holds nothing secret.
        listens = dict(zip(("host", "port"), self._door.address, strict=True))
        self.trace.event("board", path=str(self._arenas.directory / BOARD), **listens)
        self._examiner = Examiner(
            node,
            Path(config.run_dir),
            self._arenas.directory,
            lambda number: self.trace.event("bundle", incident=number),
        )
        self._socket_path = str(self._arenas.directory / "agent.sock")
        self._door.add_ranks(self._socket_path)
        self._tiers = Tiers(
            config,
            node,
            self._secret,
            self._arenas,
            self.trace,
            host=host,
            changed=lambda: self._put("tiers", None),
        )
        self._prober = Prober(
            self._secret, config.env, self._clock, lambda s: self._inbox.put(("signal", s))
        )
        self._checker = SelfChecker(
            node, self._clock, lambda found: self._inbox.put(("signal", to_json(found)))
        )
        self._forks = self._make_fork_server()
        # Not the process's number: that may be given again, and differs not between hosts.
        self._boot = Boot(secrets.token_hex(8))
        self._plan = Plan()
        self._stores: dict[str, Any] = {}
        self._saves: object = None
        """Which steps go to disk, as the coordinator said last; None where the user did."""
        self._coordinator: Line | None = None
        self._coordinator_number = 0
        self._plan_asked = True
        """Whether the coordinator has told no plan yet: it takes over with the newest copy. A plan
        grows with the job, and every agent would send all of it with every report."""
        #: Measured and not reported yet (`detection.signals`, as JSON); the oldest go first.
        self._signals: deque[dict[str, object]] = deque(maxlen=4096)
        detection = config.detection
        self._pace = Pace(
            look_s=detection.look_s,
            report_s=detection.report_s,
            soonest_s=detection.soonest_s,
            next_look=self._clock.now(),
        )
        self._wall = wall_clock(config.env, node=node)
        self._stamps: tuple[float, float] | None = None
        """Wall time at which the coordinator asked for ours, and at which that came."""
        self._heard_at = self._clock.now()
        self._blind = False
        """Whether the coordinator, connected, has not been heard of for too long."""
        self._resources: Resources | None = None
        self.metrics = Metrics(config.job, node)
        """What it knows, kept up to date by its thread."""
        self._metrics_server = self._serve_metrics()
        self._preflight = None
        if config.preflight:
            self._preflight = JobPreflight(config, node, changed=lambda: self._put("tiers", None))
        self._roster = Roster(
            config,
            node,
            self._arenas,
            self.metrics,
            self.trace,
            self._clock,
            signals=self._signals,
            put=self._put,
            changed=self._has_news,
        )
        self._drills = DrillVisits(
            node,
            self._name,
            self._roster,
            self._arenas,
            self.trace,
            put=self._put,
            drain=self._begin_drain,
            tell=self._tell_coordinator,
        )
        self._ending_since: float | None = None
        self._missing_since: float | None = None
        self._plan_at = float("-inf")
        """When the newest plan came."""
        self._draining_since: float | None = None
        """When it was said that this node is about to be taken away."""
        self._unused_since: float | None = None
        """Since when no rank of a node that is drained has been in the job's world."""
        self._left_at: float | None = None
        """When the last rank of a node that is drained had left."""
        self._stopped = False
        self._news = False
        """Whether there is something to report."""

    @property
    def address(self) -> tuple[str, int]:
        """Where coordinators reach this agent."""
        return self._door.address

    @property
    def outcome(self) -> Stop | None:
        """How the job ended, as the newest plan says; None while it does not."""
        return self._plan.stop

    def run(self) -> None:
        """Serve until the job has ended and every rank is gone. Blocks."""
        self._door.open(
            self._node,
            self._secret,
            self.trace,
            take=self._put,
            # Who only asks whether somebody is there, knows it by now.
            guests={PAIR_TEST: self._prober.serve, REACH: lambda sock, _: sock.close()},
            visitors=(drill_key(self._secret), self._drills.receive)
            if self._config.drills
            else None,
        )
        self._tiers.start()
        self._resources = Resources(
            self._config,
            self._node,
            state_bytes=lambda: state_bytes(self._arenas.copies()),
            seen=lambda seen: self._inbox.put(("measured", seen)),
        )
        next_tick = self._pace.next_look = self._clock.now()
        try:
            while not self._stopped:
                wait = max(0.0, self._pace.next_look - self._clock.now())
                try:
                    self._handle(*self._inbox.get(timeout=wait))
                    # Report once for everything that has come in.
                    for _ in range(self._inbox.qsize()):
                        self._handle(*self._inbox.get_nowait())
                except queue.Empty:
                    pass
                now = self._clock.now()
                if now >= next_tick and not self._stopped:
                    next_tick = now + self._config.times.tick_s
                    self._gather(now)
                    self._roster.memory.sample(now)
                    self._end_if_due()
                    self._end_if_drained(now)
                    self._spawn_missing()
                if self._pace.woke(now) and self._pace.tells(now, self._still_s(now)):
                    self._news = True
                if self._news:
                    self._tell_coordinator()
        finally:
            self.close()

    def _still_s(self, now: float) -> float | None:
        """For how long nothing here has moved."""
        return self._arenas.still_s(self._roster.facts.values(), now)

    def stop(self) -> None:
        """End at once, killing every rank. From any thread or signal handler."""
        self._inbox.put(("stop", None))

    def drain(self) -> None:
        """This node is about to be taken away: have its ranks leave, then end. As `stop`."""
        self._inbox.put(("drain", None))

    def close(self) -> None:
        """Kill what runs and remove what this node holds. Safe to call twice."""
        self._stopped = True
        self._roster.close()
        if self._coordinator is not None:
            self._coordinator.close()
        self._door.close()
        if self._forks is not None:
            self._forks.close()
        if self._resources is not None:
            self._resources.close()
        server, self._metrics_server = self._metrics_server, None
        if server is not None:
            server.close()
        self._prober.close()
        self._checker.close()
        if self._preflight is not None:
            self._preflight.close()
        self._tiers.close()
        self._examiner.close()
        self._arenas.remove()
        self.trace.close()

    # What comes in.

    def _has_news(self) -> None:
        """There is something to report, once all that has come in is handled."""
        self._news = True

    def _handle(self, kind: str, value: Any) -> None:
        match kind:
            case "exits":
                if self._roster.exits(*value):
                    self._carry_out()
            case "exit":
                self._roster.gone(value)
                self._carry_out()  # its seat may have been waiting for it
            case "rank":
                if self._roster.connected(*value) and (self._plan.version or self._plan.term):
                    self._roster.send(value[0], self._told_plan())
            case "said":
                self._rank_said(*value)
            case "coordinator":
                self._coordinator_connected(*value)
            case "plan":
                self._hear(*value)
            case "signal":
                self._signals.append(value)
                self._has_news()
            case "visit":
                line, message = value
                led = self._coordinator is not None and not self._blind
                draining = self._draining_since is not None
                self._drills.take(line, message, self._plan, draining=draining, led=led)
            case "forks":
                self._spawn_missing()
            case "tiers":
                self._end_if_due()
                self._has_news()
            case "measured":
                self._signals.append(to_json(value))
                self._signals.extend(to_json(seen) for seen in self._tiers.io())
                self._watch_coordinator()
                heard = self._coordinator is not None and not self._blind
                self.metrics.set("ftkit_agent_coordinator_connected", heard)
                paths = {self._config.run_dir: "run", self._config.checkpoint_dir: "checkpoint"}
                self.metrics.take_node(value, paths)
            case "drain":
                self._begin_drain()
            case "stop":
                self._stopped = True

    def _put(self, kind: str, value: Any) -> None:
        """(any thread) Have the agent's thread handle it."""
        self._inbox.put((kind, value))

    # Ranks.

    def _spawn(self, seat: Assignment) -> None:
        env = rank_environment(
            self._config,
            seat,
            agent=self._socket_path,
            secret=self._secret.hex(),
            host=self._host,
            shm_dir=self._arenas.directory,
            restarts=self._plan.restarts,
            inherited=self._inherited,
        )
        self._roster.start(seat, env, self._forks.start if self._forks is not None else execute)

    def _rank_said(self, member: MemberId, message: dict[str, Any]) -> None:
        facts = self._roster.of(member)
        if facts is None:
            return
        try:
            match message.get("type"):
                case "hello":
                    self._roster.listens(facts, message)
                case "standing":
                    self._roster.stands(facts, message)
                    if message["allowed"]:
                        self._tiers.keep_others()
                    self._spawn_missing()
                case "arena":
                    self._tiers.make_arena(
                        facts.seat,
                        message["layout"],
                        int(message["replicas"]),
                        lambda answer: self._roster.send(member, {"type": "arena", **answer}),
                        pid=facts.pid,
                        gpu_node=None if (gpu := message.get("gpu_node")) is None else int(gpu),
                    )
                case "signal":
                    self._signals.append(message["signal"])
                case other:
                    logger.warning("member %s sent an unknown message %r", member, other)
        except (KeyError, TypeError, ValueError) as error:
            logger.warning("member %s sent a malformed message: %s", member, error)

    # Plans and facts.

    def _coordinator_connected(self, number: int, line: Line) -> None:
        if number < self._coordinator_number:
            line.close()
            return
        if self._coordinator is not None:
            self._coordinator.close()
        self._coordinator, self._coordinator_number = line, number
        self._plan_asked = True
        self._has_news()

    def _hear(self, number: int, message: dict[str, Any]) -> None:
        """A coordinator said something."""
        if number < self._coordinator_number:
            return
        self._heard_at = self._clock.now()
        match message.get("type"):
            case "look":
                self._look_closely(message)
            case "pairs":
                self._prober.take(message.get("tests"))
            case "reach":
                self._prober.reach(self._node, message.get("tests"))
            case "check":
                self._checker.start()
            case "clock":
                try:
                    self._stamps = float(message["sent"]), self._wall()
                except (KeyError, TypeError, ValueError, OverflowError) as error:
                    logger.error("the coordinator asked for no clock: %s", error)
            case _:
                self._take_plan(message)

    def _watch_coordinator(self) -> None:
        """Say when a coordinator that is connected says nothing: nobody judges then."""
        silent_s = self._clock.now() - self._heard_at
        blind = self._coordinator is not None and silent_s > BLIND_S
        if blind and not self._blind:
            logger.warning(
                "the coordinator has said nothing for %.0f s: training goes on, and nobody is "
                "judged meanwhile",
                silent_s,
            )
        if blind != self._blind:
            self.trace.event("blind" if blind else "sighted", what="coordinator")
        self._blind = blind

    def _look_closely(self, message: dict[str, Any]) -> None:
        """Something was found: keep what can be seen of it here, before it changes."""
        try:
            number, wanted = int(message["incident"]), {int(m) for m in message["members"]}
        except (KeyError, TypeError, ValueError) as error:
            logger.error("the coordinator asked for no look: %s", error)
            return
        patients = self._roster.patients(wanted)
        records = self._arenas.records(self._roster.facts.values(), RECORDS_KEPT)
        self._examiner.examine(number, patients, records)

    def _take_plan(self, message: dict[str, Any]) -> None:
        try:
            plan = Plan.from_json(message["plan"])
        except (ProtocolError, KeyError) as error:
            logger.error("the coordinator sent no plan: %s", error)
            return
        self._plan_asked = False
        stores = dict(message.get("stores", {}))
        saves = message.get("saves")
        moved = (stores, saves) != (self._stores, self._saves)
        self._stores, self._saves = stores, saves
        is_new = plan.order > self._plan.order
        if is_new:
            self._plan, self._plan_at = plan, self._clock.now()
        self._tiers.take(self._plan, message)
        if not is_new:
            # Nodes come and go without a new plan, and ranks read snapshots from them.
            if moved:
                self._roster.send_all(self._told_plan())
            return
        self._roster.send_all(self._told_plan())
        self._carry_out()

    def _carry_out(self) -> None:
        """Make this node what the plan says."""
        self._roster.evict(self._plan.evicted)
        self._spawn_missing()
        if self._plan.mode is Mode.ENDED and self._ending_since is None:
            self._ending_since = self._clock.now()
            self._roster.ask_to_end()
        self._has_news()

    def _spawn_missing(self) -> None:
        """Start the members the plan wants this agent to start, and that never ran.

        A replacement waits until the survivors on this node are in their new world, have its state
        and have let their spares in, or for `SPAWN_LATEST_S`: starting Python takes a core, and
        they need it now.
        """
        missing = [
            s
            for s in self._plan.seats
            if s.node == self._node and s.boot == self._boot and s.member not in self._roster.facts
        ]
        if not missing or self._plan.stop or self._draining_since is not None:
            self._missing_since = None
            return
        if self._missing_since is None:
            self._missing_since = self._clock.now()
        waited = self._clock.now() - self._missing_since
        importing = self._forks is not None and self._forks.state is State.STARTING
        if importing and waited < PRELOAD_LATEST_S:
            return
        if between_worlds(self._plan, self._roster.facts.values()):
            planned = self._clock.now() - self._plan_at
            # A world that is not formed at once waits for just this replacement.
            forming = self._plan.mode is Mode.FORMING
            if (planned < FORMED_S) if forming else (waited < SPAWN_LATEST_S):
                return
        for seat in missing:
            if self._roster.vacant(seat.seat):
                self._spawn(seat)

    def _end_if_due(self) -> None:
        """Once the job has ended: wait for the ranks, then do not."""
        if self._ending_since is None:
            return
        if self._through():
            self._has_news()
            self._stopped = True
        elif self._clock.now() - self._ending_since > self._config.times.grace_s:
            self._roster.kill()

    def _begin_drain(self) -> None:
        if self._plan.mode is Mode.ENDED or self._draining_since is not None:
            self._stopped = True  # asked twice: at once
            return
        self._draining_since = self._clock.now()
        logger.warning("node %s is about to be taken away: its ranks leave", self._node)
        self.trace.event("drain")
        self._has_news()

    def _end_if_drained(self, now: float) -> None:
        """Of a node that is about to be taken away: end once its ranks have left, or time is up."""
        since = self._draining_since
        if since is None:
            return
        if self._left_at is None and self._roster.all_ended:
            self._left_at = now
            self.trace.event("drained", seconds=now - since)
        elif self._left_at is None:
            unused, before = self._none_trains(), self._unused_since
            self._unused_since = (now if before is None else before) if unused else None
            if self._unused_since is not None and now - self._unused_since > LEAVE_S:
                self._roster.kill(STANDS_BY)  # nobody waits for them
        left = self._left_at is not None and now - self._left_at > LINGER_S
        self._stopped = self._stopped or left or now - since > DRAIN_S

    def _none_trains(self) -> bool:
        """Whether the job goes on without any rank of this node."""
        plan = self._plan
        if plan.mode is not Mode.RUNNING or plan.world is None:
            return False
        worlds = [plan.world] if plan.joining is None else [plan.world, plan.joining]
        return not any(w.first_on(self._node) for w in worlds)

    def _through(self) -> bool:
        """Whether, the job being over, nothing is left to wait for: no rank, no last checkpoint."""
        if not self._roster.all_gone:
            return False
        stop, since = self._plan.stop, self._ending_since
        if stop is None or since is None:
            return True
        return self._tiers.through(stop, self._clock.now() - since)

    def _make_fork_server(self) -> ForkServer | None:
        program = Program.of(self._config.command)
        if not self._config.preload or program is None:
            return None
        env = common_environment(self._config, inherited=self._inherited)
        return ForkServer(
            env,
            cwd=self._config.cwd or None,
            frameworks=program.frameworks(),
            changed=lambda: self._inbox.put(("forks", None)),
        )

    def _look(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The rows of the ranks and what the tiers hold; metrics and signals take what is new."""
        facts, now = self._roster.facts.values(), self._clock.now()
        self._gather(now)
        still_s = self._still_s(now)
        stands = (
            still_s is not None and still_s >= STILL_S
        ) or now - self._roster.halted_at < HALTED_S
        rows = self._arenas.rows(facts, tails=stands)
        tiers = self._tiers.facts()
        self.metrics.take_rows(rows)
        self.metrics.take_tiers(tiers)
        return rows, tiers

    def _gather(self, now: float) -> None:
        """Take what ranks have finished, at every tick: their rings hold no more than the newest."""
        alive = self._roster.alive
        finished = self._arenas.steps(alive)
        self._signals.extend(finished)
        self._signals.extend(self._arenas.comm(alive, now=now))
        self.metrics.take_steps(finished)

    def _tell_coordinator(self) -> None:
        """Report; without a coordinator only look, for metrics are read all the same."""
        self._news = False
        if self._stopped and self._coordinator is None:
            return
        rows, tiers = self._look()
        if self._coordinator is None:
            return
        now = self._clock.now()
        facts, signals = self._roster.facts.values(), list(self._signals)
        steps = {r["row"]["member"]: r["row"]["step"] for r in rows}
        sent = self._send(
            self._coordinator,
            {
                "type": "facts",
                "node": self._node,
                "boot": self._boot,
                "name": self._name,
                "members": [
                    f.to_json() | {"at_step": steps.get(f.member, f.at_step)} for f in facts
                ],
                **tiers,
                "rows": rows,
                "signals": signals,
                "plan": self._plan.to_json() if self._plan_asked else None,
                "ended": self._stopped or (self._ending_since is not None and self._through()),
                "draining": self._draining_since is not None,
                "saves": self._saves,
                "clock": self._told_clock(),
                # Of interest before ranks start, and to nobody afterwards.
                "preflight": self._preflight.result
                if self._preflight is not None and not self._roster.started
                else None,
                "late_s": round(self._pace.reported(now), 3),
                "at": self._clock.now(),
            },
        )
        if sent:
            self._signals.clear()  # those that were not, are told to the next one

    def _serve_metrics(self) -> MetricsServer | None:
        port = self._config.metrics_port
        if not port:
            return None
        # Several nodes of one machine share its address.
        port += self._node if self._host.startswith("127.") else 0
        try:
            return MetricsServer(self.metrics, self._host, port)
        except OSError as error:
            self.trace.event("metrics-failed", port=port, reason=str(error))
            logger.warning("no metrics are served at port %s: %s", port, error)
            return None

    def _told_clock(self) -> list[float] | None:
        """The stamps that were asked for, once, with that of the answer."""
        stamps, self._stamps = self._stamps, None
        return None if stamps is None else [*stamps, self._wall()]

    def _told_plan(self) -> dict[str, object]:
        told = {"type": "plan", "plan": self._plan.to_json(), "stores": self._stores}
        return told | ({"saves": self._saves} if self._saves else {})

    def _send(self, line: Line, message: dict[str, object]) -> bool:
        """Whether it could be sent."""
        try:
            line.send(message)
        except WireError as error:
            logger.debug("a peer hung up: %s", error)
            return False
        return True


def node_name(config: JobConfig, node: NodeId, host: str, environ: Mapping[str, str]) -> str:
    """What this machine is called in every job, whatever its number is in this one."""
    name = environ.get(NAME_VARIABLE) or socket.gethostname()
    # Several nodes on one machine are there for trying things out: each is one of its own.
    return f"{name}/{node}" if config.agents > 1 and host.startswith("127.") else name
