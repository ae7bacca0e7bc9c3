"""Which run a command means: a folder of one, or its name under runs/."""

from pathlib import Path

from ftkit.core.errors import UsageError
from ftkit.launch.choices import near

#: Where runs lie that no --run-dir puts elsewhere.
RUNS = Path("runs")


def newest_run(run_dir: Path | None) -> Path:
    """The run meant: the one given, by its folder or by its name under runs/, else the newest."""
    if run_dir is not None:
        for folder in (run_dir, RUNS / run_dir):
            if (folder / "events").is_dir():
                return folder
        raise UsageError(
            f"{run_dir} is not a run's folder: it has no events/. Give the folder of one, or its name "
            f"under {RUNS}/; a job makes it as it starts{near(run_dir.name, runs())}"
        )
    found = runs()
    if not found:
        raise UsageError(f"no run was found under {RUNS}/; give the folder of one")
    # Not the folder itself, in which commands leave their files: a run of last week would be the newest.
    return max(found.values(), key=lambda p: (p / "events").stat().st_mtime)


def runs() -> dict[str, Path]:
    """The runs under runs/, by name."""
    return {p.name: p for p in RUNS.glob("*") if (p / "events").is_dir()}
