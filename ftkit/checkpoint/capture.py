"""Capture: a committed step's state into the arena while the next step computes.

Parameters and optimizer state are still until the optimizer's next step, so the copy may run
beside forward and backward (DataStates-LLM, HPDC'24). ::

    begin(t)        gate()                  begin(t+1)
    --|-- forward, backward --|-- optimizer.step --|--> training thread
      |== copy, digest, seal =|                         capture thread

`begin` copies at once what forward may change, and queues the rest. `gate`, called just before
the optimizer mutates anything, takes chunks from the same queue: at worst the training thread
pays one plain copy, never a wait for a thread that was not scheduled.

Not seen by the gate: whatever changes parameters or optimizer state outside an optimizer
(`load_state_dict`, a weight average in place). `validate=True` catches it.
"""

import atexit
import os
import threading
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.chunks import PADDING, WHOLE, Share, Unit, chunk_count, units
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.memory import LiveMemory, fill
from ftkit.checkpoint.ports import TraceHook
from ftkit.checkpoint.slabs import Pin
from ftkit.checkpoint.state import Picture, ProtectedState
from ftkit.checkpoint.writer import SlabWriter
from ftkit.core.errors import StateChanged, UsageError
from ftkit.core.ids import Generation, Step

#: Niceness of the capture thread. Linux counts it by thread, and anybody may raise his own.
NICE = 10

#: Taken from the queue at once: half a millisecond of copying, for one look at the lock.
UNITS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureStats:
    """What one snapshot cost the training thread."""

    step: Step
    generation: Generation
    bytes: int
    """Bytes of this rank's share."""
    begin_s: float
    """Seconds in `begin`."""
    gate_s: float
    """Seconds in `gate`."""
    assisted_bytes: int
    """Bytes that the training thread had to copy itself."""
    sealed_after_s: float
    """Seconds from the start of `begin` until the snapshot was sealed."""

    @property
    def blocked_s(self) -> float:
        return self.begin_s + self.gate_s


@dataclass(frozen=True, slots=True)
class _Cut:
    """What a share of a layout is made of."""

    layout: StateLayout
    share: Share
    whole: frozenset[int]
    units: tuple[Unit, ...]

    entries: range
    """The layout's entries that have bytes in it."""


class _Job:
    """One snapshot under way. What is below the line belongs to Capture's lock."""

    def __init__(
        self,
        writer: SlabWriter,
        picture: Picture,
        todo: "_Cut",
        shadow: NDArray[np.uint8] | None,
    ) -> None:
        self.writer = writer
        self.picture = picture
        self.units = todo.units
        self.shadow = shadow
        """A copy made at once, to validate against; then the gate seals, not the workers."""
        # ---- under the lock ----
        self.taken = 0
        self.running = 0
        self.assisted_bytes = 0
        self.error: BaseException | None = None
        self.stopped = False
        self.sealing = False
        self.sealed_s: float | None = None

    @property
    def may_take(self) -> bool:
        return self.taken < len(self.units) and not self.stopped and self.error is None

    @property
    def may_seal(self) -> bool:
        """All is copied, and nobody else is going to seal."""
        copied = self.taken == len(self.units) and self.running == 0
        return copied and not (
            self.sealing or self.stopped or self.error or self.shadow is not None
        )

    @property
    def settled(self) -> bool:
        """No worker touches live tensors or the slab, and none will."""
        if self.running or (self.sealing and self.sealed_s is None and self.error is None):
            return False
        return not self.may_take and not self.may_seal


class Capture:
    """Copies one rank's state into its arena. `begin`, `gate` belong to the training thread."""

    def __init__(
        self,
        arena: Arena,
        state: ProtectedState,
        trace: TraceHook | None = None,
        *,
        validate: bool = False,
    ) -> None:
        """Start the capture thread.

        Args:
          arena: writable; stays the caller's, and must outlive this object.
          state: what to capture.
          trace: told of each snapshot ("snapshot") and each failure ("snapshot-failed").
          validate: compare every snapshot, and the live CPU tensors, with a copy made at once.
            Costs two more copies of the state and the time to make them: for finding out, not
            for production. CUDA tensors are compared as they arrived on the host.
        """
        if not arena.writable:
            raise UsageError(f"{arena.path.name} was opened read-only; capture writes to it")
        self._arena = arena
        self._state = state
        self._trace = trace
        self._validate = validate
        self._memory = LiveMemory()
        self._cut: _Cut | None = None
        self._begun = 0.0, 0.0
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._job: _Job | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ftkit-capture", daemon=True)
        self._thread.start()
        # A daemon thread that copies into a mapping must be gone before the interpreter is.
        atexit.register(self.close)
        self.layout: StateLayout | None = None
        """Of the newest snapshot that was to begin."""
        self.last: CaptureStats | None = None
        """The newest snapshot that was sealed."""
        self.snapshots = 0
        """Snapshots sealed."""
        self.blocked_s = 0.0
        """Seconds the training thread has spent here in all."""
        self.bytes = 0
        """Bytes captured in all."""

    def begin(
        self,
        step: Step,
        generation: Generation,
        *,
        share: Share = WHOLE,
        layouts: int = 1,
        complete: Step | None = None,
        pins: Collection[Pin] = (),
    ) -> float:
        """Start to capture this rank's share of the state of a committed step.

        Blocks for the early tensors, and for a capture that was never gated.

        Args:
          step: the step just committed.
          generation: the generation this rank is in.
          share: its share among the replicas that hold the same state.
          layouts: how many different layouts make up the job's state.
          complete: the newest step complete on every rank; its slab is kept where possible.
          pins: the tiers below that will read this snapshot.

        Returns:
          Seconds blocked.

        Raises:
          StateChanged: parameters were added, removed or moved since the layout was made.
          CapacityError: the layout grew beyond the arena: `ensure_arena`, then `rebind`.
          AllPinned: the tiers below read all that could be overwritten: skip this snapshot.
          Exception: what the capture thread failed with before, if `gate` did not say so.
        """
        start = time.monotonic()
        self.gate()
        picture = self._state.picture()
        self.layout = picture.layout
        cut = self._cut_for(picture.layout, share)
        writer = self._arena.start(
            step,
            generation,
            picture.layout,
            share=share,
            layouts=layouts,
            complete=complete,
            pins=pins,
        )
        self._memory.bind(picture.live, cut.entries)
        if self._memory.whole != cut.whole:
            cut = self._cut_for(picture.layout, share)
        shadow = self._copy_now(writer, cut.units) if self._validate else None
        job = _Job(writer, picture, cut, shadow)
        spent = time.monotonic() - start
        self._begun = start, spent
        self.blocked_s += spent
        with self._changed:
            self._job = job
            self._changed.notify_all()
        return spent

    def gate(self) -> float:
        """Return once the snapshot under way is sealed. Call before the optimizer's step.

        Copies what is left together with the capture thread. Returns at once when nothing is
        under way.

        Returns:
          Seconds blocked.

        Raises:
          StateChanged: with `validate`, the state was changed too early; not sealed.
          Exception: what the capture thread failed with. The snapshot is lost, older ones are
            not, and the next `begin` starts afresh.
        """
        job = self._job
        if job is None:
            return 0.0
        start = time.monotonic()
        try:
            self._help(job)
            if job.shadow is not None:
                self._compare(job, job.shadow)
                self._seal(job)
        except BaseException as error:
            self.abandon()
            self._tell("snapshot-failed", step=job.writer.step, error=repr(error))
            raise
        self._job = None
        spent = time.monotonic() - start
        self.blocked_s += spent
        self._count(job, spent)
        return spent

    def abandon(self) -> None:
        """Give up the snapshot under way, for a roll back or a new generation. Safe any time.

        Returns once no thread reads live tensors any more. A snapshot already sealed stays.
        """
        job = self._job
        if job is None:
            return
        with self._changed:
            job.stopped = True
            while not job.settled:
                self._changed.wait()
        self._job = None

    def rebind(self, arena: Arena) -> None:
        """Use another arena from the next `begin` on; the old one may be closed after."""
        if not arena.writable:
            raise UsageError(f"{arena.path.name} was opened read-only; capture writes to it")
        self.gate()
        self._arena = arena

    def close(self) -> None:
        """Finish the snapshot under way and end the thread. May be called twice.

        Raises what `gate` raises; the thread has ended nevertheless.
        """
        atexit.unregister(self.close)
        if os.getpid() != self._pid:
            # A fork has no capture thread, and no business in its parent's arena.
            return
        try:
            self.gate()
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            # Something else went wrong and is on its way up: do not hide it behind ours.
            self.abandon()
        self.close()

    def _run(self) -> None:
        """The capture thread."""
        # The kernel lets training and communication go first; `gate` copies what is left.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while True:
            with self._changed:
                # The training thread lets go of a job without this lock: look at one value.
                while not self._closing and not _has_work(job := self._job):
                    self._changed.wait()
                if self._closing:
                    return
            assert job is not None, "the wait above ends only with a job"
            try:
                job.writer.reserve()
                self._memory.wait()
                while self._work(job) is not None:
                    pass
            except BaseException as error:  # noqa: BLE001 - the owner's next call raises it
                self._fail(job, error)

    def _help(self, job: _Job) -> None:
        """Work on `job` in the training thread until it is settled; raise what it failed with."""
        job.writer.reserve()
        self._memory.wait()
        while (copied := self._work(job)) is not None:
            job.assisted_bytes += copied
        with self._changed:
            while not job.settled:
                # Only for what the thread has in hand: a few units, or the seal.
                self._changed.wait()
        if job.error is not None:
            raise job.error

    def _work(self, job: _Job) -> int | None:
        """Do one thing for `job`; the bytes copied, or None when there was nothing to do."""
        with self._changed:
            todo: tuple[Unit, ...] = ()
            if job.may_take:
                todo = job.units[job.taken : job.taken + UNITS]
                job.taken += len(todo)
                job.running += 1
            elif job.may_seal:
                job.sealing = True
            else:
                return None
        if not todo:
            self._seal(job)
            return 0
        error: BaseException | None = None
        try:
            return sum(fill(job.writer, self._memory, unit) for unit in todo)
        except BaseException as caught:
            error = caught
            raise
        finally:
            # In one stroke: a job without error and with nothing running would be sealed.
            with self._changed:
                job.running -= 1
                job.error = job.error or error
                self._changed.notify_all()

    def _seal(self, job: _Job) -> None:
        try:
            job.writer.seal(job.picture.small)
        except BaseException as error:
            self._fail(job, error)
            raise
        with self._changed:
            job.sealed_s = time.monotonic()
            self._changed.notify_all()

    def _fail(self, job: _Job, error: BaseException) -> None:
        with self._changed:
            job.error = job.error or error
            self._changed.notify_all()

    def _cut_for(self, layout: StateLayout, share: Share) -> _Cut:
        whole, known = self._memory.whole, self._cut
        if known is None or (known.layout, known.share, known.whole) != (layout, share, whole):
            size = self._arena.geometry.chunk_bytes
            chunks = share.chunks(chunk_count(layout.total_bytes, size))
            made = units(layout, size, whole, chunks)
            touched = [p.entry for unit in made for p in unit.pieces if p.entry != PADDING]
            entries = range(min(touched), max(touched) + 1) if touched else range(0)
            self._cut = known = _Cut(layout, share, whole, made, entries)
        return known

    def _copy_now(self, writer: SlabWriter, todo: tuple[Unit, ...]) -> NDArray[np.uint8]:
        data = np.empty_like(writer.data)
        self._memory.wait()
        for unit in todo:
            self._memory.copy(unit, data)
        return data

    def _compare(self, job: _Job, shadow: NDArray[np.uint8]) -> None:
        """StateChanged unless slab and live tensors still are what they were at `begin`."""
        now = self._copy_now(job.writer, job.units)
        for found, where in ((now, "live"), (job.writer.data, "captured")):
            if np.array_equal(shadow, found):
                continue
            at = int(np.flatnonzero(shadow != found)[0])
            piece = next(p for u in job.units for p in u.pieces if p.at <= at < p.at + p.count)
            entry = job.picture.layout.entries[piece.entry]
            raise StateChanged(
                f"{entry.name} was changed after step {job.writer.step} was committed and "
                f"before the next optimizer step (the {where} bytes differ from byte "
                f"{piece.offset + at - piece.at} of {entry.bytes} on). Protected state may change "
                "in the optimizer's step only; wait for Capture.gate() before changing it"
            )

    def _count(self, job: _Job, gate_s: float) -> None:
        begun_at, begin_s = self._begun
        assert job.sealed_s is not None, "a settled job without error is sealed"
        self.last = CaptureStats(
            step=job.writer.step,
            generation=job.writer.generation,
            bytes=job.writer.data.nbytes,
            begin_s=begin_s,
            gate_s=gate_s,
            assisted_bytes=job.assisted_bytes,
            sealed_after_s=job.sealed_s - begun_at,
        )
        self.snapshots += 1
        self.bytes += self.last.bytes
        self._tell("snapshot", **asdict(self.last))

    def _tell(self, kind: str, **fields: object) -> None:
        if self._trace is not None:
            self._trace(kind, **fields)


def _has_work(job: _Job | None) -> bool:
    return job is not None and (job.may_take or job.may_seal)
