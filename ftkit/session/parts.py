"""Parts: what a rank is made of, put together once by `assemble`."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ftkit.collectives.config import CollectivesConfig, Transport
from ftkit.collectives.group import Group
from ftkit.collectives.handle import blocked_s
from ftkit.core import corruption_plan, pace_plan
from ftkit.core.clock import MonotonicClock
from ftkit.core.corruption_plan import PlannedCorruption
from ftkit.core.detour import Detour
from ftkit.core.errors import UsageError
from ftkit.core.fault_plan import from_environ
from ftkit.core.ids import Generation, MemberId, Seat
from ftkit.core.rank_env import RankEnv
from ftkit.core.trace import Trace
from ftkit.detection import stacks
from ftkit.detection.config import DetectionConfig
from ftkit.detection.meter import Gauges
from ftkit.detection.recorder import Recorder
from ftkit.detection.status import BOARD, StatusBoard
from ftkit.session import plain
from ftkit.session.control import Control
from ftkit.session.core_clock import CoreClock
from ftkit.session.drag import Drag
from ftkit.session.gc_clock import GcClock
from ftkit.session.inject import Injector
from ftkit.session.membership import Membership
from ftkit.session.path_report import PathReport

#: Longest time in seconds that one Python thread keeps the interpreter from another.
SWITCH_S = 0.0005

#: How long links may take to come up for a rank that is alone: it has none.
ALONE_STALL_S = 30.0


@dataclass(slots=True, kw_only=True)
class Parts:
    """One rank's connections to the rest of the job. The session closes them."""

    env: RankEnv | None
    """None for a process that is alone."""
    seat: Seat
    member: MemberId
    control: Control | None
    trace: Trace
    recorder: Recorder
    membership: Membership
    group: Group
    injector: Injector
    drag: Drag
    paths: PathReport
    corruptions: list[PlannedCorruption]
    stall_s: float
    _last: contextlib.ExitStack = field(repr=False)

    def close(self) -> None:
        """Say goodbye to peers and agent, and let go of everything."""
        self.group.close()
        if self.control is not None:
            self.control.close()
        self.recorder.close()
        self._last.close()
        self.trace.close()


#: How payloads travel between ranks of one host: auto, tcp or cma.
TRANSPORT: Final = "FTKIT_TRANSPORT"


def transport_of(environ: Mapping[str, str]) -> Transport:
    """What the environment asks for, `Transport.AUTO` by default. UsageError: there is no such."""
    given = environ.get(TRANSPORT) or Transport.AUTO.value
    try:
        return Transport(given)
    except ValueError:
        known = ", ".join(Transport)
        raise UsageError(f"{TRANSPORT} is {given!r}, and may be one of {known}") from None


def assemble(env: RankEnv | None, environ: Mapping[str, str]) -> Parts:
    """Make the parts of a rank of the job `env`, or of a process that is alone.

    Raises:
      WireError: the agent cannot be reached.
      OSError: nothing can listen on the rank's address.
    """
    last = contextlib.ExitStack()
    # The communication thread needs the interpreter for microseconds, many times a step: it
    # must not wait for the 5 ms that a thread which computes in Python may keep it.
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
    seat = Seat(env.seat if env else 0)
    member = MemberId(env.member if env else 0)
    control = Control(env) if env else None
    trace = Trace(Path(os.devnull))
    if env is not None:
        name = f"seat-{seat}-member-{member}.jsonl"
        trace = Trace(Path(env.run_dir) / "events" / name, seat=seat, member=member)
    plain.give_way()
    cores = CoreClock()
    last.callback(cores.close)
    recorder = _recorder(env, member, cores, last)
    if env is not None:
        last.enter_context(stacks.answering(Path(env.shm_dir), member))
    detour = Detour.read(environ, seat)
    transport = transport_of(environ) if detour is None else Transport.TCP

    def abort(generation: Generation, reason: str) -> None:
        group.abort(generation, reason)

    membership = Membership(
        member,
        report=control.report if control else _say_nothing,
        abort=abort,
        unlinked=lambda: group.unlinked,
        parted=lambda world: group.parted(world),
        trace=trace,
    )
    group = Group(
        member=member,
        secret=bytes.fromhex(env.secret) if env else os.urandom(32),
        host=env.host if env else "127.0.0.1",
        on_fault=membership.take_fault,
        on_tell=lambda _, payload: membership.take_admission(payload),
        recorder=recorder,
        detour=detour,
        config=CollectivesConfig(transport=transport),
    )
    faults = from_environ(environ, member=member)
    return Parts(
        env=env,
        seat=seat,
        member=member,
        control=control,
        trace=trace,
        recorder=recorder,
        membership=membership,
        group=group,
        injector=Injector(faults, trace, group.light_fuse),
        drag=Drag(pace_plan.from_environ(environ, member=member), trace, cores.starved_s),
        paths=PathReport(group, member, seat, control.report if control else _say_nothing),
        corruptions=corruption_plan.from_environ(environ, member=member),
        stall_s=env.max_stall_s if env else ALONE_STALL_S,
        _last=last,
    )


def _recorder(
    env: RankEnv | None, member: MemberId, cores: CoreClock, last: contextlib.ExitStack
) -> Recorder:
    """The recorder on the node's status board, or on one of its own when alone."""
    collector = GcClock()
    last.callback(collector.close)
    gauges = Gauges(
        blocked_s=blocked_s,
        cpu_s=time.thread_time,
        gc_s=collector.seconds,
        starved_s=cores.starved_s,
    )
    if env is None:
        folder = Path(last.enter_context(tempfile.TemporaryDirectory()))
        board = StatusBoard.create(folder / BOARD, seats=1)
        last.callback(board.close)
        return Recorder(board.attach(0, member), MonotonicClock(), gauges=gauges)
    board = StatusBoard.open(Path(env.shm_dir) / BOARD)
    last.callback(board.close)
    return Recorder(
        board.attach(env.local_seat, member),
        MonotonicClock(),
        heartbeat_interval_s=DetectionConfig(max_stall_s=env.max_stall_s).heartbeat_interval_s,
        gauges=gauges,
    )


def _say_nothing(message: dict[str, object]) -> None:
    """There is no agent to tell."""
