"""The connection to this node's agent: plans come in, standing goes out."""

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any

from ftkit.core import exit_codes, lifeline
from ftkit.core.errors import CapacityError, WireError
from ftkit.core.rank_env import RankEnv
from ftkit.core.wire import Line, connect
from ftkit.recovery.plan import Plan
from ftkit.recovery.saving import Schedule

logger = logging.getLogger(__name__)

#: Allocating shared memory runs at about 1 GB/s: an arena of 500 GB still gets its time.
ARENA_S = 600.0


class Control:
    """One rank's line to its agent. Owns the socket and one receiving thread."""

    def __init__(self, env: RankEnv) -> None:
        """Connect and authenticate. Blocks for at most ten seconds; WireError."""
        told = lifeline.own()
        self._line: Line = connect(
            env.agent,
            bytes.fromhex(env.secret),
            hello={
                "role": "rank",
                "seat": env.seat,
                "member": env.member,
                "pid": os.getpid(),
                "lifeline": told and told._asdict(),
            },
        )
        self._closing = False
        self._stores: Mapping[str, Any] = {}
        self._saves: Schedule | None = None
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, take_plan: Callable[[Plan], None]) -> None:
        """Begin to receive; every plan goes to `take_plan`, on the receiving thread."""
        self._thread = threading.Thread(
            target=self._receive, args=(take_plan,), name="ftkit-control", daemon=True
        )
        self._thread.start()

    def report(self, message: dict[str, object]) -> None:
        """Send one message. A lost agent is noticed by the receiving thread."""
        try:
            self._line.send(message)
        except WireError:
            logger.debug("the agent is gone; the receiving thread will see it too")

    def arena(self, layout: object, replicas: int, *, gpu_node: int | None = None) -> str:
        """Have the agent make this seat's arena, or a larger one. Blocks. One call at a time.

        Args:
          layout: of the state, JSON-safe.
          replicas: among how many ranks the state is shared out.
          gpu_node: the memory node that this rank's GPU hangs on, if it is known.

        Returns:
          The path of the arena, owned by the agent and outliving this process.

        Raises:
          CapacityError: the node's shared memory is too small; says how much is needed.
        """
        self.report({"type": "arena", "layout": layout, "replicas": replicas, "gpu_node": gpu_node})
        try:
            answer = self._answers.get(timeout=ARENA_S)
        except queue.Empty:
            raise CapacityError(
                f"the agent did not make the arena within {ARENA_S:g} s; is the machine "
                "swapping, or the agent stopped?"
            ) from None
        if error := answer.get("error"):
            raise CapacityError(str(error))
        return str(answer["path"])

    @property
    def stores(self) -> Mapping[str, Any]:
        """Where each node serves its arenas: node number as text to [host, port]."""
        return self._stores

    @property
    def saves(self) -> Schedule | None:
        """Which steps go to disk, where the job decides that itself; None before it has."""
        return self._saves

    def close(self) -> None:
        """Hang up. The agent will see this process end, or not, as it pleases."""
        self._closing = True
        self._line.close()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _receive(self, take_plan: Callable[[Plan], None]) -> None:
        try:
            while True:
                message = self._line.receive()
                match message.get("type"):
                    case "plan":
                        self._stores = message.get("stores", {})
                        if (saves := message.get("saves")) is not None:
                            self._saves = Schedule.from_json(saves)
                        take_plan(Plan.from_json(message["plan"]))
                    case "arena":
                        self._answers.put(message)
                    case other:
                        logger.warning("the agent sent %r, which this version does not know", other)
        except WireError as error:
            if self._closing:
                return
            # Without its agent a rank is on its own: nobody would restart it, or end it.
            logger.error("this rank's agent is gone (%s): exiting", error)
            os._exit(exit_codes.AGENT_GONE)
