"""Persister: one thread of an agent that writes this node's part of checkpoints.

It does what the newest order says (`checkpointing`), one thing after another, and reports how
far it is. Training knows nothing of it: what it reads is pinned, and whatever goes wrong here
is a report. It never raises, and never keeps its agent waiting.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ftkit.checkpoint.copies import let_go, local_copies
from ftkit.checkpoint.gate import GATED_BYTES, Gate, OpenGate, go_through
from ftkit.checkpoint.persist.checkpoint import load, steps
from ftkit.checkpoint.persist.commit import begin, commit
from ftkit.checkpoint.persist.division import divide
from ftkit.checkpoint.persist.folder import PART
from ftkit.checkpoint.persist.gather import Gather
from ftkit.checkpoint.persist.gc import gc, remove
from ftkit.checkpoint.persist.keep import policies
from ftkit.checkpoint.persist.lease import Lease
from ftkit.checkpoint.persist.manifest import Fragment
from ftkit.checkpoint.persist.plan import CheckpointPlan, Piece
from ftkit.checkpoint.persist.source import identity
from ftkit.checkpoint.persist.store import Store, open_store
from ftkit.checkpoint.persist.write import write
from ftkit.checkpoint.slabs import Pin
from ftkit.core.clock import Clock, MonotonicClock
from ftkit.core.errors import FtkitError, IntegrityError, ProtocolError, StoreError
from ftkit.core.ids import JobId, NodeId
from ftkit.core.trace import Trace
from ftkit.detection.signals import IoSeen
from ftkit.launch.checkpointing import Order, Report, Stage
from ftkit.launch.config import JobConfig
from ftkit.launch.faulty_store import FaultyStore, StoreFault
from ftkit.launch.timed_store import TimedStore

logger = logging.getLogger(__name__)

#: Niceness of the thread: training goes first.
NICE = 10

#: A store that needs longer than this for one node's part is as good as broken. Only for the
#: report: training waits for neither.
WRITE_S = 600.0

#: Between two renewals of the lease, which runs out after three of them.
RENEW_S = 20.0

#: Between two reports of how much is written.
TELL_S = 0.5

#: A byte of a checkpoint is read for its checksum, read again, and written to the page cache.
_TOUCHES = 3.0

#: How long the end of an agent waits for what is under way: its own end is waited for, too.
CLOSE_S = 2.0


class Persister:
    """Owns its thread, the store and, while this node commits, the lease."""

    def __init__(
        self,
        config: JobConfig,
        node: NodeId,
        secret: bytes,
        trace: Trace,
        *,
        changed: Callable[[], None],
        store: Store | None = None,
        clock: Clock | None = None,
        gate: Gate | None = None,
    ) -> None:
        """Start the thread.

        Args:
          config: the job, with a `checkpoint_dir`.
          node: this one.
          secret: the job's.
          trace: told of checkpoints committed here.
          changed: called, on the thread, whenever `report` would say something new.
          store: in place of that at `checkpoint_dir`.
          clock: for the profile.
          gate: asked before each piece of a file, so that it keeps out of training's way.
        """
        self._config = config
        self._node = node
        self._secret = secret
        self._trace = trace
        self._tell = changed
        self._given = store
        self._piece_bytes = None if gate is None else GATED_BYTES
        self._gate = gate or OpenGate()
        self._clock = clock or MonotonicClock()
        self._store: TimedStore | None = None
        self._lease: Lease | None = None
        self._directory = config.shm_dir(node)
        # ---- under the condition ----
        self._changed = threading.Condition()
        self._order: Order | None = None
        self._servers: Mapping[NodeId, tuple[str, int]] = {}
        self._report = Report()
        self._tidying = False
        self._closing = False
        # ---- of the thread ----
        self._began = 0.0
        self._renewed = 0.0
        self._told = 0.0
        self._holding = False
        """Whether parts may be pinned for the order before."""
        self._thread = threading.Thread(target=self._run, name="ftkit-persist", daemon=True)
        self._thread.start()

    def take_message(self, order: object, stores: Mapping[str, Any]) -> None:
        """`take` what came from the coordinator. Nonsense is logged, and counts as no order."""
        try:
            taken = Order.from_json(order) if isinstance(order, Mapping) else None
            servers = {NodeId(int(n)): (str(a[0]), int(a[1])) for n, a in stores.items()}
        except (ProtocolError, ValueError, TypeError, IndexError) as error:
            logger.error("the coordinator's order is none: %s", error)
            taken, servers = None, {}
        self.take(taken, servers)

    def take(self, order: Order | None, servers: Mapping[NodeId, tuple[str, int]]) -> None:
        """Take the newest order, None when nothing is to be written. From any thread."""
        with self._changed:
            self._order, self._servers = order, servers
            self._changed.notify_all()

    def report(self) -> Report:
        """How far this node is, and what it has that is due. From any thread."""
        due = local_copies(JobId(self._config.job), self._directory, self._node, pinned=Pin.DUE)
        with self._changed:
            return replace(self._report, due=tuple(due))

    @property
    def tidying(self) -> bool:
        """Whether it removes old checkpoints, its part of the newest being done."""
        with self._changed:
            return self._tidying

    def close(self) -> None:
        """End the thread between two of its steps, and give the lease up. Safe to call twice."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        # It may hang in a store that does not answer; then it ends with the process.
        self._thread.join(timeout=CLOSE_S)

    def _run(self) -> None:
        """(persister thread) Do what is ordered, until closed."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        if self._node == 0:
            self._guarded(self._renew)  # before anything is due: the root is this job's
        while True:
            with self._changed:
                todo = self._next()
                while todo is None and not self._closing:
                    if not self._changed.wait(RENEW_S):
                        break
                    todo = self._next()
                servers = self._servers
                if self._closing:
                    break
            if todo is None:
                if self._lease is not None:
                    self._guarded(self._renew)
                continue
            order, stage = todo
            if order is None:
                let_go(self._directory, Pin.PERSIST)
                self._holding = False
                continue
            if order.attempt != self._report.attempt:
                let_go(self._directory, Pin.PERSIST)
                self._holding = True
                self._say(Report(attempt=order.attempt))
            error = self._guarded(self._do, order, stage, servers)
            if error:
                self._say(replace(self._report, error=error))
        if self._lease is not None:
            self._guarded(self._lease.release)

    def _next(self) -> tuple[Order | None, Stage] | None:
        """(under the lock) The next thing to do; None when there is nothing."""
        order, mine = self._order, self._report
        if order is None:
            return (None, Stage.NOTHING) if self._holding else None
        if order.attempt != mine.attempt:
            return order, Stage.BEGIN
        if mine.error or mine.done >= order.stage or self._node not in order.nodes:
            return None
        return order, Stage(mine.done + 1)

    def _guarded(self, act: Callable[..., object], *args: object) -> str:
        """Do something that may fail; returns what was wrong, or nothing."""
        try:
            act(*args)
        except (FtkitError, OSError) as error:
            logger.debug("checkpointing: %s", error)
            return str(error) or type(error).__name__
        except Exception as error:
            # The thread must live on: the next checkpoint may succeed.
            logger.exception("writing a checkpoint failed in a way that is ftkit's own fault")
            return repr(error)
        return ""

    def _say(self, report: Report, *, tidying: bool = False) -> None:
        with self._changed:
            self._report, self._tidying = report, tidying
        self._tell()

    def _do(self, order: Order, stage: Stage, servers: Mapping[NodeId, tuple[str, int]]) -> None:
        match stage:
            case Stage.BEGIN:
                self._began = self._clock.now()
                if self._node in order.writers:
                    with self._gather(servers) as parts:
                        parts.keep(order.copies)
            case Stage.CLEAR if order.committer == self._node:
                if self._clear(order):
                    stage = Stage.COMMIT  # of an earlier attempt: nothing is left to do
            case Stage.WRITE if self._node in order.writers:
                self._write(order, servers)
            case Stage.COMMIT if order.committer == self._node:
                self._commit(order, servers)
            case _:
                pass
        committed = stage is Stage.COMMIT and order.committer == self._node
        self._say(replace(self._report, done=stage), tidying=committed)
        if committed:
            self._collect()
            self._say(self._report)

    def _clear(self, order: Order) -> bool:
        """Make room for the step; True when it has been committed before, whole."""
        store = self._open()
        lease = self._renew()
        for name in store.names():
            if name.startswith(_FRAGMENT):
                store.remove(name)
        for step in steps(store):
            known = identity(store, step)
            if known is None:
                remove(store, step)  # of a writer that died, or met a full disk
            elif step == order.step:
                if known not in self._config.checkpoint_ignore and _whole(store, order, lease):
                    return True
                remove(store, step)
        begin(store, order.step, lease)
        return False

    def _write(self, order: Order, servers: Mapping[NodeId, tuple[str, int]]) -> None:
        store = self._open()
        with self._gather(servers) as parts:
            layouts = parts.layouts(order.copies)
            plan = CheckpointPlan.of(e for x in layouts.values() for e in x.entries)
            fragment = write(
                store,
                order.step,
                plan,
                self._counting(parts.pieces(divide(order.copies, layouts).get(self._node, ()))),
                small=parts.small(order.copies),
                timeout_s=WRITE_S,
                clock=self._clock,
                admit=self._admit,
                piece_bytes=self._piece_bytes,
            )
            parts.still_there()
        store.put(_fragment(order, self._node), fragment.encode())

    def _commit(self, order: Order, servers: Mapping[NodeId, tuple[str, int]]) -> None:
        store, lease = self._open(), self._renew()
        with self._gather(servers) as parts:
            layouts = parts.layouts(order.copies)
        plan = CheckpointPlan.of(e for x in layouts.values() for e in x.entries)
        names = [_fragment(order, node) for node in order.writers]
        fragments = [Fragment.decode(store.get(name)) for name in names]
        # What `--fresh` leaves behind goes when it can be replaced, and not before; and before
        # the commit, so that it cannot be taken for something newer than this run.
        for step in steps(store):
            if identity(store, step) in self._config.checkpoint_ignore:
                lease.check()
                remove(store, step)
        record = commit(store, order.step, plan, fragments, lease, clock=self._clock)
        seconds = self._clock.now() - self._began
        self._trace.event(
            "checkpoint",
            step=order.step,
            url=store.url,
            writers=len(order.writers),
            seconds=seconds,
            **asdict(record.profile),
        )
        for name in names:
            store.remove(name)

    def _collect(self) -> None:
        """Remove what retention does not keep."""
        wanted = policies(self._config.checkpoint_keep)
        if not wanted:
            return
        try:
            found = gc(self._open(), wanted, self._renew())
        except (FtkitError, OSError) as error:
            self._trace.event("checkpoint-not-removed", reason=str(error))
            return
        if found.removed or found.damaged:
            self._trace.event(
                "checkpoint-removed",
                steps=list(found.removed),
                kept=list(found.kept),
                damaged={str(s): why for s, why in found.damaged.items()},
            )

    def _gather(self, servers: Mapping[NodeId, tuple[str, int]]) -> Gather:
        return Gather(
            job=JobId(self._config.job),
            directory=self._directory,
            node=self._node,
            servers=servers,
            secret=self._secret,
        )

    def _open(self) -> TimedStore:
        if self._store is None:
            store = self._given or open_store(self._config.checkpoint_dir)
            fault = StoreFault.from_environ(self._config.env, node=self._node)
            run_dir = Path(self._config.run_dir)
            store = FaultyStore(store, fault, run_dir) if fault else store
            self._store = TimedStore(store, self._node, self._clock)
        return self._store

    def io(self) -> list[IoSeen]:
        """For how long the store was waited for since the last call. From any thread."""
        store = self._store
        return [] if store is None else store.take()

    def _counting(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """The same pieces; between them it is told how much is written, and the lease renewed."""
        written = 0
        for piece in pieces:
            now = self._clock.now()
            if self._lease is not None and now - self._renewed > RENEW_S:
                self._renew()
            if now - self._told > TELL_S:
                self._told = now
                self._say(replace(self._report, written=written))
            yield piece
            written += piece.data.nbytes

    def _admit(self, nbytes: int) -> None:
        """Wait until a piece of a file may go; the lease must not run out meanwhile."""

        def check() -> None:
            if self._closing:
                raise StoreError("the agent ends; what was written so far is not committed")
            if self._lease is not None and self._clock.now() - self._renewed > RENEW_S:
                self._renew()

        # What is written has no acknowledgement: it counts as gone at once.
        self._gate.given_up(go_through(self._gate, nbytes, touches=_TOUCHES, check=check))

    def _renew(self) -> Lease:
        """The job's lease, taken or shown to be still ours."""
        self._renewed = self._clock.now()
        if self._lease is None:
            job = JobId(self._config.job)
            self._lease = Lease.take(self._open().beneath, job, term_s=3 * RENEW_S)
            return self._lease
        try:
            self._lease.check()
        except FtkitError:
            self._lease = None  # another node of the job had it meanwhile: take it back next time
            raise
        return self._lease


#: Fragments lie in the root, where a checkpoint has no foreign file, and `gc` clears them away.
_FRAGMENT = f"{PART}fragment-"


def _fragment(order: Order, node: NodeId) -> str:
    return f"{_FRAGMENT}{order.attempt}-{node}"


def _whole(store: Store, order: Order, lease: Lease) -> bool:
    """Whether the step's checkpoint, of before a restart, is good to the last byte."""
    try:
        load(store, order.step).verify(lambda _: lease.keep())
    except IntegrityError:
        return False
    return True
