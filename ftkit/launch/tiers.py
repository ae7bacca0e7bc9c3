"""Tiers: what one node keeps of the job's state, in memory, as parity and on disk."""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ftkit.checkpoint.serve import ArenaServer
from ftkit.core.errors import FtkitError
from ftkit.core.governor import TrafficLimits
from ftkit.core.ids import JobId, NodeId, Seat
from ftkit.core.trace import Trace
from ftkit.detection.signals import IoSeen
from ftkit.launch.arenas import Arenas
from ftkit.launch.config import JobConfig
from ftkit.launch.ending import UNTOLD_S, limit_s
from ftkit.launch.keeper import Keeper
from ftkit.launch.parity import ParityTier
from ftkit.launch.traffic import TrafficGate
from ftkit.recovery.plan import Mode, Plan, Stop

if TYPE_CHECKING:
    from ftkit.launch.persister import Persister


class Tiers:
    """The byte server, parity and the persister of one agent, over its arenas.

    Of the agent's thread; each of the three has threads of its own, and so has the keeper of older
    copies, where a job allows approximate recovery.
    """

    def __init__(
        self,
        config: JobConfig,
        node: NodeId,
        secret: bytes,
        arenas: Arenas,
        trace: Trace,
        *,
        host: str,
        changed: Callable[[], None],
    ) -> None:
        """Serve the arenas, and begin to wait for orders.

        Args:
          config: the job.
          node: this one.
          secret: the job's.
          arenas: the node's; they stay the caller's.
          trace: told of parity and checkpoints.
          host: the address to serve at.
          changed: called, on any thread, when `facts` would say something new.
        """
        self._arenas = arenas
        self._gate = None
        if config.max_slowdown is not None:
            limits = TrafficLimits(
                max_slowdown=config.max_slowdown,
                rate_max=config.link_cap,
                memory_rate_max=config.memory_cap,
            )
            self._gate = TrafficGate(arenas, limits, trace)
        self._parity = None
        if config.code is not None:
            self._parity = ParityTier(
                config, config.code, node, secret, arenas, trace, gate=self._gate
            )
        self._server = ArenaServer(
            arenas.directory,
            JobId(config.job),
            secret,
            host=host,
            operations=self._parity.operations if self._parity else {},
        )
        self._keeper: Keeper | None = None
        self._make_keeper = partial(
            Keeper,
            JobId(config.job),
            node,
            secret,
            arenas.directory,
            trace,
            host=host,
            changed=changed,
            gate=self._gate,
        )
        self._persister = _persister(config, node, secret, trace, changed, self._gate)
        self._servers: dict[NodeId, tuple[str, int]] = {}
        """Where nodes that have ranks serve their arenas."""
        self._over = False
        """Whether the coordinator waits for no checkpoint any more."""

    def start(self) -> None:
        """Begin to make parity."""
        if self._parity is not None:
            self._parity.start()

    def keep_others(self) -> None:
        """The job allows approximate recovery: keep an older copy of another node's shards."""
        if self._keeper is None:
            self._keeper = self._make_keeper()
            self._keeper.take(self._servers)

    def take(self, plan: Plan, message: Mapping[str, Any]) -> None:
        """Take the newest plan, and the rest of the coordinator's message. Does not block."""
        stores = dict(message.get("stores", {}))
        with_ranks = {s.node for s in plan.seats}
        self._servers = {
            NodeId(int(n)): (str(a[0]), int(a[1]))
            for n, a in stores.items()
            if int(n) in with_ranks
        }
        if self._keeper is not None:
            self._keeper.take(self._servers)
        if self._gate is not None:
            self._gate.set_open(plan.mode is not Mode.RUNNING)
        if self._persister is not None:
            self._persister.take_message(message.get("checkpoint"), stores)
        self._over = bool(message.get("checkpoints_over"))
        if self._parity is not None:
            self._parity.take(plan, stores, message.get("parity_s"))

    def facts(self) -> dict[str, object]:
        """What the coordinator is told: what is here, where it is served, how far the rest is."""
        copies = self._arenas.copies()
        return {
            "copies": copies if self._parity is None else self._parity.good(copies),
            "parity": None if self._parity is None else self._parity.report(),
            "kept": self._keeper and self._keeper.report(),
            "store": list(self._server.address),
            "persister": self._persister and self._persister.report().to_json(),
        }

    def io(self) -> list[IoSeen]:
        """For how long this node's stores were waited for since the last call."""
        return [] if self._persister is None else self._persister.io()

    def make_arena(
        self,
        seat: Seat,
        layout: object,
        replicas: int,
        answer: Callable[[dict[str, object]], None],
        *,
        pid: int | None = None,
        gpu_node: int | None = None,
    ) -> None:
        """Have an arena made for a seat: `Arenas.ensure`, with its path or the error as answer.

        Allocating gigabytes takes a while: it is done aside, and `answer` called there.
        """

        def make() -> None:
            try:
                path = self._arenas.ensure(seat, layout, replicas, pid=pid, gpu_node=gpu_node)
                answer({"path": str(path)})
            except (FtkitError, OSError) as error:
                answer({"error": str(error)})

        threading.Thread(target=make, name=f"ftkit-arena-{seat}", daemon=True).start()

    def through(self, stop: Stop, ended_s: float) -> bool:
        """Whether nothing is left to be written, the job and its ranks having ended.

        Args:
          stop: how it ended.
          ended_s: seconds since.
        """
        if self._persister is None or not limit_s(stop) or ended_s > limit_s(stop) + UNTOLD_S:
            return True
        return self._over and (stop.code != 0 or not self._persister.tidying)

    def close(self) -> None:
        """End it all. Safe to call twice."""
        if self._persister is not None:
            self._persister.close()
        if self._keeper is not None:
            self._keeper.close()
        self._server.close()
        if self._parity is not None:
            self._parity.close()


def _persister(
    config: JobConfig,
    node: NodeId,
    secret: bytes,
    trace: Trace,
    changed: Callable[[], None],
    gate: TrafficGate | None,
) -> "Persister | None":
    if not config.checkpoint_dir:
        return None
    # Imported here: a job without checkpoints needs no pyarrow in its agents.
    from ftkit.launch.persister import Persister

    return Persister(config, node, secret, trace, changed=changed, gate=gate)
