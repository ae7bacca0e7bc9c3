"""Arenas: the shared memory of one node, owned by its agent and outliving its ranks."""

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ftkit.checkpoint.arena import arena_path
from ftkit.checkpoint.copies import local_copies
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.numa import choose, memory_nodes
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.slabs import SLABS
from ftkit.core.errors import FtkitError, UsageError
from ftkit.core.ids import JobId, MemberId, NodeId, Seat
from ftkit.core.process_stat import start_ticks
from ftkit.detection.node_ops import NodeOps
from ftkit.detection.process import process_facts
from ftkit.detection.signals import to_json
from ftkit.detection.status import BOARD, StatusBoard
from ftkit.detection.track import EXEMPT
from ftkit.launch.config import JobConfig
from ftkit.recovery.facts import ALIVE, MemberFacts

logger = logging.getLogger(__name__)

OWNER = "owner"

#: Seconds between two looks at the rings of collectives.
COMM_EVERY_S = 0.5

#: A collective that has been pending for so long does not transfer anything: at least so many
#: seconds, and so many times as long as the longest that the rings tell of; and at most these.
PENDING_S, PENDING_TIMES, PENDING_MOST_S = 1.0, 3.0, 60.0

#: Of each member so many collectives are told while nothing moves.
TAIL = 32

#: Slabs that parity pins: the step that counts, and the one its successor is made of. With them
#: gone there are still the three that a capture needs.
PARITY_SLABS = 2


class Arenas:
    """The node's folder of shared memory: its status board, and one arena a seat."""

    def __init__(self, config: JobConfig, node: NodeId) -> None:
        """Make the folder, 0700, and the status board.

        Folders that a killed job of this user left behind are removed first.

        Raises:
          UsageError: there is no such root of shared memory, or it is not ours to write to, or no
            such memory node.
          CapacityError: shared memory is full.
          FileExistsError: another agent of this job runs for this node.
        """
        self._numa, self._memory_nodes = config.numa, memory_nodes()
        choose(config.numa, self._memory_nodes)  # one that is not there is refused now
        check_root(Path(config.shm_root))
        sweep(Path(config.shm_root))
        self.directory = config.shm_dir(node)
        self.directory.mkdir(mode=0o700)
        part = self.directory / (OWNER + ".part")
        part.write_text(f"{os.getpid()} {start_ticks(os.getpid())}")
        part.replace(self.directory / OWNER)  # another agent's sweep may read it at any moment
        self._job = JobId(config.job)
        # One more, for the snapshot that is on its way to disk.
        self.slabs = (
            SLABS + (PARITY_SLABS if config.code else 0) + (1 if config.checkpoint_every else 0)
        )
        """Of each arena."""
        self.writing = threading.Lock()
        """Held by whoever makes or fills an arena that no rank has open."""
        self._node = node
        self._seats = config.places
        """Places on this node; seats of other nodes that come here keep theirs."""
        self._board = StatusBoard.create(self.directory / BOARD, seats=config.places)
        #: The number of the last step that was read of each member.
        self._steps_read: dict[MemberId, int] = {}
        self._ops = NodeOps()
        self._comm_at = 0.0
        self._pending_s = PENDING_S
        """From when on a collective counts as stuck, by the rings at the last `transfers`."""

    def ensure(
        self,
        seat: Seat,
        layout: object,
        replicas: int,
        *,
        pid: int | None = None,
        gpu_node: int | None = None,
    ) -> Path:
        """The seat's arena, with room for a share of the state. Slow: allocates.

        Args:
          seat: whose.
          layout: of the state (`StateLayout.to_json`).
          replicas: among how many it is shared out.
          pid: of the rank, whose processors tell on which memory node it is to lie.
          gpu_node: the one that the rank's GPU hangs on.

        Raises:
          CapacityError: there is not enough shared memory; says how much is needed.
          ProtocolError: `layout` is not one.
        """
        path = arena_path(self._job, seat, self.directory)
        wanted = StateLayout.from_json(layout)
        cpus: set[int] = set()
        if pid is not None:
            with contextlib.suppress(OSError):  # it ended meanwhile
                cpus = os.sched_getaffinity(pid)
        place = choose(self._numa, self._memory_nodes, cpus=cpus, gpu_node=gpu_node)
        if place.node is not None:
            logger.info("%s on memory node %d: %s", path.name, place.node.number, place.reason)
        # A rank that dies while it waits leaves its request behind, and the next one asks too.
        with self.writing:
            ensure_arena(path, wanted, replicas=replicas, slabs=self.slabs, node=place.node).close()
        return path

    def copies(self) -> list[dict[str, object]]:
        """Every sealed part of a snapshot on this node (`Copy.to_json`)."""
        return [c.to_json() for c in local_copies(self._job, self.directory, self._node)]

    def still_s(self, members: Iterable[MemberFacts], now: float) -> float | None:
        """For how long no member that runs has moved; None where that means nothing.

        It does not while one is on its way in or out: then others wait for the world.
        """
        moved: float | None = None
        for member in members:
            if member.stage not in ALIVE:
                continue
            try:
                row = self._board.read(member.seat % self._seats)
            except FtkitError:
                return None
            if row is None or row.member != member.member or row.phase in EXEMPT:
                return None
            moved = max(moved or 0.0, row.t_progress_ns / 1e9)
        return None if moved is None else now - moved

    def rows(self, members: Iterable[MemberFacts], *, tails: bool = False) -> list[dict[str, Any]]:
        """The status rows of the members that run, with what /proc says of them.

        With `tails`, their newest collectives too.
        """
        found: list[dict[str, Any]] = []
        for member in members:
            if member.stage not in ALIVE:
                continue
            try:
                row = self._board.read(member.seat % self._seats)
            except FtkitError:
                continue  # a damaged row says nothing; the detector notices the silence
            if row is None or row.member != member.member:
                continue
            facts = process_facts(member.pid)
            told: dict[str, Any] = {
                "seat": member.seat,
                "row": row.to_json(),
                "facts": facts and facts.to_json(),
            }
            if tails:
                local = member.seat % self._seats
                records = self._board.records(local, TAIL)
                told["ops"] = [r.to_json() for r in records if r.member == member.member]
                awaited = self._board.awaited(local)
                told["awaited"] = awaited and awaited.to_json()
            found.append(told)
        return found

    def records(self, members: Iterable[MemberFacts], count: int) -> dict[int, list[Any]]:
        """The newest collectives at the seats of these members, JSON-safe, by seat."""
        return {
            m.seat: [r.to_json() for r in self._board.records(m.seat % self._seats, count)]
            for m in members
        }

    def transferring(self, now: float) -> tuple[bool, float]:
        """Whether a rank is in a collective, and since when one or none is. Costs a few microseconds.

        One that is pending for much longer than any took lately moves nothing: somebody is late,
        or gone. The first long one of a run is not known yet, and counts as busy for `PENDING_S`.
        """
        busy, begun, since = False, now, 0.0
        for local in range(self._seats):
            try:
                stands = self._board.standing(local)
            except FtkitError:
                continue
            if stands is None:
                continue
            entered = stands.t_enter_ns / 1e9
            if stands.t_enter_ns and now - entered < self._pending_s:
                busy, begun = True, min(begun, entered)
            else:
                # Not the row's last change: a phase that begins in an idle window is not its begin.
                since = max(since, stands.t_moved_ns / 1e9)
        return busy, begun if busy else since

    def transfers(self, now: float) -> tuple[list[tuple[float, float | None]], float]:
        """The newest collectives of all ranks, (begin, end) each in the board's seconds.

        Returns:
          The collectives, and the time from which on those of every rank are known.
        """
        found, known_after = list[tuple[float, float | None]](), 0.0
        rings = [self._board.records(local) for local in range(self._seats)]
        self._pending_s = _pending_s(
            (r.t_leave_ns - r.t_enter_ns) / 1e9 for ring in rings for r in ring if r.t_leave_ns
        )
        for records in rings:
            for record in records:
                begin, end = record.t_enter_ns / 1e9, record.t_leave_ns / 1e9
                if record.t_leave_ns:
                    found.append((begin, end))
                elif now - begin < self._pending_s:
                    found.append((begin, None))
            if records:
                known_after = max(known_after, min(r.t_enter_ns for r in records) / 1e9)
        return found, known_after

    def steps(self, members: Iterable[MemberFacts]) -> list[dict[str, object]]:
        """The steps these members have finished since the last call, as signals.

        A member that hangs or is dead has left what it finished; ask once more after its end.
        """
        found: list[dict[str, object]] = []
        for member in members:
            after = self._steps_read.get(member.member, -1)
            seat = member.seat % self._seats
            for record in self._board.steps(seat, member=member.member, after=after):
                self._steps_read[member.member] = record.number
                found.append(to_json(record.seen_at(member.seat)))
        return found

    def comm(self, members: Iterable[MemberFacts], *, now: float) -> list[dict[str, object]]:
        """How long these members were in their newest collectives, as signals; a sample.

        Reads the rings twice a second at most, however often it is asked.
        """
        if now - self._comm_at < COMM_EVERY_S:
            return []
        self._comm_at = now
        found: list[dict[str, object]] = []
        for member in members:
            records = self._board.records(member.seat % self._seats)
            own = (r for r in records if r.member == member.member)
            found += [to_json(seen) for seen in self._ops.take(member.seat, own)]
        return found

    def remove(self) -> None:
        """Unmap the board and remove the folder with everything in it."""
        self._board.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def _pending_s(took_s: Iterable[float]) -> float:
    """How long a collective may be pending until it counts as stuck, by what others took."""
    return min(PENDING_MOST_S, max(PENDING_S, PENDING_TIMES * max(took_s, default=0.0)))


def check_root(root: Path) -> None:
    """Raise UsageError unless folders of shared memory can be made in `root`."""
    if not root.is_dir() or not os.access(root, os.W_OK | os.X_OK):
        raise UsageError(
            f"--shm-root {root} is no directory that this user can write to; give one in memory, "
            "such as /dev/shm"
        )


def sweep(root: Path) -> list[Path]:
    """Remove the folders of agents that no longer run, and say which."""
    removed = []
    for folder in root.glob("ftkit-*-n*"):
        try:
            owner = (folder / OWNER).read_text()
            stale = folder.stat().st_uid == os.getuid() and not _runs(owner)
        except (OSError, ValueError):
            continue  # somebody else's, or being made
        if stale:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def _runs(owner: str) -> bool:
    """Whether the process runs that wrote this about itself. Raises ValueError if none did."""
    pid, started = map(int, owner.split(" "))
    return start_ticks(pid) == started
