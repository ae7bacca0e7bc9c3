"""Budget: whether a dead process is replaced, or the job has to stop, with the reason.

Pure. Two limits: a seat that keeps failing without getting anywhere is a bug in the script
or a broken place, and no number of retries mends it (504-GPU report, arXiv 2605.09370: about one
blind retry in eighteen succeeds); and a job may replace `restarts_max` processes in all.
"""

import signal
import zlib
from dataclasses import dataclass, field, replace

from ftkit.core import exit_codes
from ftkit.core.ids import MemberId, Step
from ftkit.recovery.facts import MemberFacts
from ftkit.recovery.ladder import Attempt, LadderConfig, Next, Rung, climb
from ftkit.recovery.plan import Assignment, Stop


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetConfig:
    """How much failure a job takes before it stops."""

    same_place_max: int = 3
    """Failures of one seat in a row, without progress between them, that stop the job."""
    progress_steps: int = 10
    """Steps a replaced process must commit for its seat's failures to be forgotten."""
    restarts_max: int = 100
    """Processes a job may replace in all."""
    retries: LadderConfig = field(default_factory=lambda: LadderConfig(wait_s=2.0))
    """How long a seat stays empty whose replacement failed as well."""
    cuts_max: int = 3
    """Generations in a row that may end with the same link broken, without progress between
    them, before one of its ends has to go (`partition`)."""

    def __post_init__(self) -> None:
        counts = (self.same_place_max, self.progress_steps, self.cuts_max)
        if min(counts) < 1 or self.restarts_max < 0:
            raise ValueError(f"a budget cannot be negative, got {self}")


def respawn(
    seat: Assignment,
    dead: MemberFacts,
    *,
    step: Step,
    restarts: int,
    member: MemberId,
    config: BudgetConfig,
    counts: bool = True,
) -> Assignment | Stop:
    """The seat with its next incarnation `member`, or the reason to stop.

    Args:
      seat: the seat whose process died.
      dead: what is known of that process.
      step: the last step the job is known to have committed.
      restarts: processes replaced so far.
      member: the number the next incarnation will have.
      config: the limits.
      counts: whether it is one of the processes that a job may replace: those that a drill strikes
        are not.
    """
    if dead.exit_code == exit_codes.USAGE:
        return Stop(
            code=exit_codes.USAGE,
            reason=f"rank in seat {seat.seat} refused to go on, as any other would"
            + _quoted(dead.error),
        )
    entry = seat.joined_step if dead.entry_step is None else dead.entry_step
    # It plays `at_step`, so it has committed the one before.
    reached = max(dead.at_step - 1, dead.step or 0)
    made_progress = reached - entry >= config.progress_steps
    failures = 1 if made_progress else seat.failures + 1
    if failures >= config.same_place_max:
        return Stop(
            code=exit_status(dead.exit_code),
            reason=(
                f"rank in seat {seat.seat} failed {failures} times {_place(dead, step)} "
                f"(last: {describe_exit(dead.exit_code)}); replacing it again would not help"
                + _quoted(dead.error)
            ),
        )
    if counts and restarts >= config.restarts_max:
        return Stop(
            code=exit_status(dead.exit_code),
            reason=f"{restarts} processes were replaced, the most this job allows"
            + _quoted(dead.error),
        )
    return replace(seat, member=member, failures=failures, joined_step=step)


def next_attempt(seat: Assignment, dead: MemberFacts, config: BudgetConfig) -> Next:
    """How the seat is filled next: how long after the death, and whether somewhere else.

    A first loss is made good at once. A replacement that failed too, without getting anywhere,
    was an attempt at recovery that failed, and those are `ladder`'s.

    Args:
      seat: as `respawn` returned it.
      dead: what is known of the process that died last.
      config: the limits.
    """
    failed = Attempt(rung=Rung.IN_PROCESS, failure=describe_exit(dead.exit_code))
    # Jobs that lost the same storage at the same time are not to come back together.
    chance = zlib.crc32(f"{seat.boot}/{dead.member}".encode()) / 2**32
    return climb(
        [failed] * (seat.failures - 1),
        chance=chance,
        config=config.retries,
        barred=frozenset({Rung.NODE, Rung.RESTART, Rung.OLDER}),
    )


def describe_exit(code: int | None) -> str:
    """An exit code in words: 'killed by SIGKILL', 'exited with 1'."""
    if code is None:
        return "lost with its node"
    if code >= 0:
        return f"exited with {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def exit_status(code: int | None) -> int:
    """The shell's exit status for a process's exit code: 128 + signal, never 0."""
    if code is None or code == 0:
        return 1
    return 128 - code if code < 0 else code


def _place(dead: MemberFacts, step: Step) -> str:
    if dead.at_step:
        return f"at or near step {dead.at_step}"
    return f"before it played a step of its own, the job having committed {step}"


def _quoted(error: str) -> str:
    return f":\n{error}" if error else ""
