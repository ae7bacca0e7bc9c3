"""The live view: follows a run's event files and shows them on a terminal, or as plain lines."""

import json
import threading
from pathlib import Path
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from ftkit.core.trace import read_run
from ftkit.launch.checker import Answer, Outcome
from ftkit.launch.event_tail import EventTail
from ftkit.launch.report_view import RunView, Story, duration

#: More would push the progress bar off a small terminal.
_STORIES_SHOWN = 12


def watch(
    run_dir: Path,
    *,
    stop: threading.Event,
    steps: int | None = None,
    title: str = "training",
    console: Console | None = None,
    interval_s: float = 0.1,
) -> RunView:
    """Show a run until its "end" event, or until `stop` is set; returns what was seen.

    Blocks its thread; touches nothing but the event files (read) and the console. On a
    terminal: a progress bar and one line an incident, redrawn in place. Elsewhere: one line
    for every 10 % of the steps and one each time an incident moves on.

    Args:
      run_dir: where the job writes; may be empty still.
      stop: set by the caller when the job is over for any other reason. What was written
        until then is still read.
      steps: the job's steps, for the bar; None when unknown.
      title: what to call the run.
      console: where to show it; standard output when None.
      interval_s: how often to look.
    """
    console = console or Console()
    tail, view = EventTail(run_dir), RunView()
    screen: _Bar | _Lines
    screen = _Bar(console, title, steps) if console.is_terminal else _Lines(console, title, steps)
    with screen:
        while True:
            last = stop.is_set()
            for event in tail.poll():
                screen.moved(view, view.feed(event))
            screen.show(view)
            if view.ended or last:
                return view
            stop.wait(interval_s)


def follow(run_dir: Path, *, once: bool, as_json: bool) -> int:
    """`ftkit status`: show a run until it ends, or once. Returns the exit code."""
    if not (once or as_json):
        watch(run_dir, stop=threading.Event(), title=run_dir.name)
        return 0
    view = RunView()
    for event in read_run(run_dir):
        view.feed(event)
    state = {"run_dir": str(run_dir)} | view.to_json()
    if as_json:
        print(json.dumps(state))
    else:
        for name, value in state.items():
            print(f"{name:12} {value}")
    return 0


def summary(outcome: Outcome) -> RenderableType:
    """The closing panel of a drill: its answer, and the figures it rests on."""
    table = Table.grid(padding=(0, 2))
    for name, value in summary_rows(outcome):
        table.add_row(name, Text(value))  # not markup: evidence has brackets
    colour = {Answer.PASS: "green", Answer.FAIL: "red", Answer.UNKNOWN: "yellow"}[outcome.outcome]
    title = f"{outcome.fault} at {outcome.phase}: {outcome.outcome}"
    return Panel(table, title=title, border_style=colour, expand=False)


def summary_rows(outcome: Outcome) -> list[tuple[str, str]]:
    """Name and value of everything a person asks after a drill, in the order of asking."""
    equal = {True: "yes, bit for bit", False: "no", None: "unknown"}[outcome.params_equal]
    rows = [
        ("time to detect", _maybe(outcome.detect_s)),
        ("time to the survivors' next committed step", _maybe(outcome.repair_s)),
        ("steps lost", str(outcome.steps_lost)),
        ("samples lost / doubled", f"{outcome.samples_lost} / {outcome.samples_doubled}"),
        ("survivors that left", str(outcome.survivor_exits)),
        ("parameters equal the undisturbed run's", equal),
    ]
    for name, key in (("broken", "problems"), ("not known", "missing")):
        lines = outcome.evidence.get(key)
        if isinstance(lines, list):
            rows += [(name, str(line)) for line in lines]
    return rows


def _maybe(seconds: float | None) -> str:
    return "unknown" if seconds is None else duration(seconds)


class _Bar:
    """On a terminal."""

    def __init__(self, console: Console, title: str, steps: int | None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  world {task.fields[world]}"),
            TextColumn("generation {task.fields[generation]}"),
        )
        self._task = self._progress.add_task(title, total=steps, loss="…", world=0, generation=0)
        self._live = Live(self._progress, console=console, refresh_per_second=10)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def moved(self, view: RunView, story: Story | None) -> None:
        """Nothing to do for one event: `show` draws them all."""

    def show(self, view: RunView) -> None:
        self._progress.update(
            self._task,
            completed=view.step,
            loss="…" if view.loss is None else f"{view.loss:.4f}",
            world=view.world_size,
            generation=view.generation,
        )
        stories = [Text(story.sentence()) for story in view.stories[-_STORIES_SHOWN:]]
        stories += [Text(sentence, style="yellow") for sentence in view.approximate]
        stories += [Text(f"{what} {often}", style="dim") for what, often in view.chosen.items()]
        self._live.update(Group(self._progress, *stories), refresh=True)


class _Lines:
    """Where there is no terminal: a log, a pipe, a CI job."""

    def __init__(self, console: Console, title: str, steps: int | None) -> None:
        self._console, self._title, self._steps = console, title, steps
        self._every = max(1, (steps or 1000) // 10)
        self._told = self._approximate = 0
        self._chosen = dict[str, str]()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def moved(self, view: RunView, story: Story | None) -> None:
        if story is not None and (story.repaired_at is not None or story.seen_at is not None):
            self._print(story.sentence())

    def show(self, view: RunView) -> None:
        for sentence in view.approximate[self._approximate :]:
            self._print(sentence)
        self._approximate = len(view.approximate)
        for what, often in view.chosen.items() - self._chosen.items():
            self._print(f"{what} {often}")
        self._chosen = dict(view.chosen)
        if view.step // self._every > self._told // self._every:
            self._told = view.step
            of = f" of {self._steps}" if self._steps else ""
            loss = "" if view.loss is None else f"  loss {view.loss:.4f}"
            self._print(
                f"{self._title}: step {view.step}{of}{loss}  world {view.world_size}  "
                f"generation {view.generation}"
            )

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
