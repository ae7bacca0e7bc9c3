"""Job: one job from start to end, whichever engine carries it, with Ctrl-C answered."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Self

from ftkit.core.errors import UsageError
from ftkit.launch.choices import near
from ftkit.launch.config import JobConfig, new_secret
from ftkit.launch.disk import give_back, refuse_or_take
from ftkit.launch.drill_access import remove_access, write_access
from ftkit.launch.engine import Engine
from ftkit.launch.modules import check_module
from ftkit.recovery.plan import Stop

#: Between two looks at the engine and the events: an update a person perceives as live.
POLL_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupted(Stop):
    """A job's end that a signal to this process asked for."""


def engine_class(kind: str) -> Callable[[JobConfig, str], Engine]:
    """What makes an engine of this kind for a job and its secret, not started.

    Raises:
      UsageError: there is no such engine, or it needs what is not installed.
    """
    match kind:
        case "embedded":
            from ftkit.launch.embedded import EmbeddedEngine

            return EmbeddedEngine
        case "ray":
            try:
                from ftkit.launch.ray_engine import RayEngine
            except ModuleNotFoundError as error:
                if (error.name or "").partition(".")[0] != "ray":
                    raise
                raise UsageError(
                    "the engine ray needs Ray, which is not installed in this environment: "
                    "pip install 'ftkit[ray]'; on this machine alone --engine embedded does "
                    "without (Ray is the default where RAY_ADDRESS is set)"
                ) from error
            return RayEngine
        case _:
            raise UsageError(f"there is no engine {kind!r}; use embedded or ray")


def python_command(script: str, arguments: tuple[str, ...]) -> tuple[str, ...]:
    """How each rank runs `script`: a file, or with a leading "-m" a module.

    Raises:
      UsageError: there is no such file or module.
    """
    if script == "-m":
        if not arguments:
            raise UsageError("-m needs the name of a module")
        check_module(arguments[0])
        return (sys.executable, "-u", "-m", *arguments)
    if not Path(script).is_file():
        raise UsageError(
            f"there is no script {script!r} in {os.getcwd()}; give the path of a Python file, "
            f"or -m and the name of a module{near(script, beside(script))}"
        )
    return (sys.executable, "-u", script, *arguments)


def beside(script: str) -> list[str]:
    """The Python files in the folder of `script`, as a person would type them."""
    folder = Path(script).parent
    return [str(folder / path.name) for path in sorted(folder.glob("*.py"))]


def run_job(
    config: JobConfig,
    *,
    engine: str = "embedded",
    on_poll: Callable[[Engine], None] | None = None,
) -> Stop:
    """Run one job to its end. Blocks; nothing is left behind however it ends.

    Args:
      config: the job; its run_dir is made.
      engine: embedded or ray.
      on_poll: called about twenty times a second while the job runs (live view, drills).

    Returns:
      Why the job ended; its code is the exit code.

    Raises:
      UsageError: the engine cannot be used as asked, the run directory cannot be made, or
        the checkpoint directory cannot be used.
      RootInUse: another job writes its checkpoints there.
      CapacityError: the machine has no room for the job.
    """
    make = engine_class(engine)  # refused before anything is made
    events = Path(config.run_dir) / "events"
    if events.is_dir() and any(events.iterdir()):
        raise UsageError(f"{config.run_dir} holds another run; give --run-dir a new folder")
    with ExitStack() as ends:
        config = refuse_or_take(config)
        ends.callback(give_back, config)
        try:
            events.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"the run directory {config.run_dir} cannot be made: {error}"
            ) from error
        secret = new_secret()
        running = make(with_master_port(config), secret)
        with EndSignals(running) as signals, ExitStack() as closing:
            closing.callback(running.close)
            closing.callback(remove_access, Path(config.run_dir))
            closing.callback(signals.answer_none)
            try:
                write_access(config, engine, secret)
                running.start()
                while (stop := running.poll()) is None:
                    if on_poll is not None:
                        on_poll(running)
                    time.sleep(POLL_S)
                if on_poll is not None:
                    on_poll(running)
            except KeyboardInterrupt:
                if not signals.received:
                    raise
                names = " and ".join(n.name for n in signals.received)
                code = 128 + signals.received[0]
                return Interrupted(code=code, reason=f"ended at once by {names}")
        if signals.received:
            first = signals.received[0]
            return Interrupted(code=128 + first, reason=f"ended by {first.name}")
        return stop


class EndSignals:
    """Answers SIGINT and SIGTERM by an orderly end; a second one by an end at once.

    While the job is being closed none is answered: whoever is impatient would leave
    processes and shared memory behind, and the closing takes a few seconds at most.
    """

    def __init__(self, engine: Engine) -> None:
        self.received: list[signal.Signals] = []
        self._closing = False
        self._engine = engine
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._answer)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def answer_none(self) -> None:
        """From now on the job is being closed."""
        self._closing = True

    def _answer(self, number: int, frame: FrameType | None) -> None:
        if self._closing:
            return
        self.received.append(signal.Signals(number))
        if len(self.received) > 1:
            self._closing = True
            raise KeyboardInterrupt
        self._engine.interrupt()


def with_master_port(config: JobConfig) -> JobConfig:
    """The job with a free port for scripts that make their own TCPStore on rank 0."""
    if config.master_port:
        return config
    with socket.socket() as probe:
        probe.bind(("", 0))
        return replace(config, master_port=probe.getsockname()[1])
