"""`ftkit ckpt`: look at checkpoints, check, compare, convert and remove them.

Exit codes: 0 done and good; 1 something is damaged, or differs; 64 asked for what cannot be; 70
the store failed; 130 interrupted.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ftkit.core import exit_codes
from ftkit.core.errors import IntegrityError, UsageError
from ftkit.core.ids import JobId, Step
from ftkit.launch.choices import refuse_half_url

if TYPE_CHECKING:
    from ftkit.checkpoint.persist.checkpoint import Checkpoint
    from ftkit.checkpoint.persist.store import Store

#: Something is damaged, or two checkpoints differ.
BAD = 1


class Checked(click.Group):
    """Damage ends with one message and its own exit code; so does Ctrl-C."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except IntegrityError as error:
            click.echo(f"ftkit: damaged: {error}", err=True)
            sys.exit(BAD)
        except KeyboardInterrupt:
            click.echo("ftkit: interrupted; nothing was left half done", err=True)
            sys.exit(exit_codes.INTERRUPTED)


@click.group(cls=Checked)
def ckpt() -> None:
    """Look at checkpoints on disk, check, compare, convert and remove them."""


_WHERE = click.option(
    "--checkpoint-dir", "-d", "root", default=".", show_default=True,
    help="Folder or URL that holds the checkpoints.",
)  # fmt: skip
#: The same for people in a hurry: `ftkit ckpt ls runs/ckpt`.
_ROOT = click.argument("folder", required=False)
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")


@ckpt.command("ls")
@_ROOT
@_WHERE
@_JSON
def ls(folder: str | None, root: str, as_json: bool) -> None:
    """List the checkpoints in FOLDER, by their records and manifests (`scrub` reads all bytes)."""
    from ftkit.checkpoint.persist.checkpoint import load, steps

    store = _store(folder or root)
    found = list[dict[str, Any]]()  # JSON, as it will be printed
    for step in steps(store):
        line: dict[str, Any] = {"step": step, "state": "good", "why": ""}
        try:
            checkpoint = load(store, step)
            line |= {
                "bytes": _bytes(checkpoint),
                "tensors": len(checkpoint.tensors),
                "metrics": dict(checkpoint.record.metrics),
                "written_at": checkpoint.record.written_at,
            }
        except FileNotFoundError:
            line |= {"state": "partial", "why": "never committed"}
        except IntegrityError as error:
            line |= {"state": "damaged", "why": str(error)}
        except UsageError as error:
            line |= {"state": "unread", "why": str(error)}
        found.append(line)
    if as_json:
        click.echo(json.dumps({"checkpoints": found}))
    elif not found:
        click.echo(f"no checkpoints in {store.url}")
    else:
        rows = [
            (
                str(line["step"]),
                line["state"],
                _size(line["bytes"]) if "bytes" in line else "",
                str(line.get("tensors", "")),
                _date(line.get("written_at")),
                ", ".join(f"{k} {v}" for k, v in line.get("metrics", {}).items()) or line["why"],
            )
            for line in found
        ]
        _table(["step", "state", "size", "tensors", "written", "metrics"], rows)


@ckpt.command("show")
@click.argument("step", required=False)
@_WHERE
@_JSON
def show(step: str | None, root: str, as_json: bool) -> None:
    """Show the tensors of STEP (by default the newest), and where the time of its saving went.

    STEP is a number, <root>/step-<n>, or a root: then its newest.
    """
    checkpoint = _open(root, step)
    tensors: list[dict[str, Any]] = [
        {
            "name": t.name,
            "dtype": t.dtype,
            "shape": list(t.shape),
            "bytes": sum(r.bytes for r in checkpoint.chunks.get(t.name, ())),
            "chunks": len(checkpoint.chunks.get(t.name, ())),
            "codec": next((r.codec for r in checkpoint.chunks.get(t.name, ())), "raw"),
        }
        for t in checkpoint.tensors.values()
    ]
    about = {
        "step": checkpoint.step,
        "bytes": _bytes(checkpoint),
        "written_at": checkpoint.record.written_at,
        "metrics": dict(checkpoint.record.metrics),
        "profile": checkpoint.record.profile.to_json(),
        "small": sorted(checkpoint.small),
        "passed_over": {str(s): why for s, why in checkpoint.skipped.items()},
    }
    if as_json:
        click.echo(json.dumps(about | {"tensors": tensors}))
        return
    profile = checkpoint.record.profile
    click.echo(
        f"step {checkpoint.step}: {len(tensors)} tensors, {_size(_bytes(checkpoint))}; saved in "
        f"codec {profile.codec_s:.2f} s, write {profile.write_s:.2f} s, "
        f"fsync {profile.fsync_s:.2f} s, commit {profile.commit_s:.2f} s"
    )
    rows = [
        (t["name"], t["dtype"], str(t["shape"]), _size(t["bytes"]), str(t["chunks"]), t["codec"])
        for t in tensors
    ]
    _table(["tensor", "dtype", "shape", "stored", "chunks", "codec"], rows)


@ckpt.command("verify")
@click.argument("step", required=False)
@_WHERE
@_JSON
def verify(step: str | None, root: str, as_json: bool) -> None:
    """Read every byte of STEP (by default the newest) and compare it with its checksums.

    STEP is a number, <root>/step-<n>, or a root: then its newest, damaged or not.
    """
    try:
        checkpoint = _open(root, step, newest_of_all=True)
        with _bar("verifying", sum(r.bytes for r in checkpoint.rows), quiet=as_json) as done:
            count = checkpoint.verify(done)
    except IntegrityError as error:
        if as_json:
            click.echo(json.dumps({"good": False, "why": str(error)}))
        raise
    if as_json:
        click.echo(json.dumps({"good": True, "step": checkpoint.step, "bytes": count}))
    else:
        click.echo(f"step {checkpoint.step} is good: {_size(count)} read")


@ckpt.command("scrub")
@_ROOT
@_WHERE
@_JSON
def scrub(folder: str | None, root: str, as_json: bool) -> None:
    """Verify every checkpoint in FOLDER and say which are bad. Removes nothing."""
    from ftkit.checkpoint.persist.checkpoint import steps
    from ftkit.checkpoint.persist.folder import step_folder
    from ftkit.checkpoint.persist.scrub import scrub as scrub_all

    store = _store(folder or root)
    total = sum(sum(store.sizes(step_folder(s)).values()) for s in steps(store))
    with _bar("scrubbing", total, quiet=as_json) as done:
        found = scrub_all(store, done)
    if as_json:
        click.echo(json.dumps({"checkpoints": [asdict(s) for s in found]}))
    elif not found:
        click.echo(f"no checkpoints in {store.url}")
    else:
        rows = [(str(s.step), s.state, _size(s.nbytes) if s.nbytes else "", s.why) for s in found]
        _table(["step", "state", "read", "what is wrong"], rows)
    sys.exit(BAD if any(s.state == "damaged" for s in found) else 0)


@ckpt.command("diff")
@click.argument("left")
@click.argument("right")
@_WHERE
@_JSON
def diff(left: str, right: str, root: str, as_json: bool) -> None:
    """Say in which tensors two checkpoints differ: steps, or <root>/step-<n>.

    Exits with 0 when they hold the same, 1 when they differ.
    """
    from ftkit.checkpoint.persist.compare import diff as compare

    found = compare(_open(root, left), _open(root, right))
    reshaped = [f"{a} became {b}" for a, b in found.reshaped]
    differ = {
        "only_left": found.only_left,
        "only_right": found.only_right,
        "reshaped": reshaped,
        "changed": found.changed,
        "small": found.small,
    }
    if as_json:
        click.echo(json.dumps(differ | {"same": found.same}))
    else:
        for what, names in differ.items():
            for name in names:
                click.echo(f"{what.replace('_', ' ')}: {name}")
        click.echo(f"{len(found.same)} tensors are the same")
    sys.exit(BAD if any(differ.values()) else 0)


@ckpt.command("convert")
@click.argument("src")
@click.argument("dst")
@click.option(
    "--to", required=True, type=click.Choice(["safetensors", "dcp", "torch", "ftkit"]),
    help="The format of DST; that of SRC is found by looking.",
)  # fmt: skip
@click.option("--part", help="Only this part of the state (model, optimizer), by bare names.")
@_JSON
def convert(src: str, dst: str, to: str, part: str | None, as_json: bool) -> None:
    """Copy the checkpoint SRC to DST in another format, tensor by tensor.

    Of ours, a root means its newest good checkpoint, <root>/step-<n> that one. DST must not
    exist, and appears when it is whole.
    """
    from ftkit.checkpoint import convert as convert_checkpoint

    refuse_half_url(src)
    refuse_half_url(dst)
    with _bars("converting", quiet=as_json) as progress:
        done = convert_checkpoint(src, dst, to=to, part=part, progress=progress)
    if as_json:
        click.echo(json.dumps(asdict(done)))
    else:
        click.echo(f"{done.tensors} tensors, {_size(done.nbytes)}: {done.source} to {done.target}")


@ckpt.command("gc")
@click.option(
    "--keep", "keep", multiple=True, required=True,
    help="last:N, every:N or best:METRIC[:N][:max]; several add up. The newest good one stays.",
)  # fmt: skip
@_ROOT
@_WHERE
@_JSON
def gc(keep: tuple[str, ...], folder: str | None, root: str, as_json: bool) -> None:
    """Remove checkpoints in FOLDER that no --keep wants, and what dead writers left.

    The newest is read whole first, and nothing older goes unless it is good. Exits with 1 when
    one that was read is damaged.
    """
    from ftkit.checkpoint.persist.gc import gc as collect
    from ftkit.checkpoint.persist.keep import policies
    from ftkit.checkpoint.persist.lease import Lease, one_time

    wanted = policies(",".join(keep))
    store = _store(folder or root)
    with Lease.take(store, one_time(JobId("ftkit ckpt gc")), term_s=600.0) as lease:
        found = collect(store, wanted, lease)
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        for what in ("kept", "removed", "partial"):
            steps = getattr(found, what)
            click.echo(f"{what}: {', '.join(map(str, steps)) or 'none'}")
        for step, why in found.damaged.items():
            click.echo(f"damaged: step {step}: {why}")
    sys.exit(BAD if found.damaged else 0)


def _store(root: str) -> "Store":
    from ftkit.checkpoint.persist.store import open_store

    refuse_half_url(root)
    if "://" not in root and not Path(root).is_dir():
        what = "that is a file" if Path(root).is_file() else "give --checkpoint-dir"
        raise UsageError(f"there is no folder {root}; {what}")
    return open_store(root)


def _open(root: str, step: str | None, *, newest_of_all: bool = False) -> "Checkpoint":
    """The checkpoint that is meant by `step`, in `root` where it names no other.

    Args:
      root: folder or URL.
      step: a number, <root>/step-<n>, a root, or None: of the last two, the newest.
      newest_of_all: even if it is damaged; otherwise the newest good one.
    """
    from ftkit.checkpoint.persist.checkpoint import open_checkpoint
    from ftkit.checkpoint.persist.folder import step_of

    number: int | None = None
    if step is not None and step.isdecimal():
        number = int(step)
    elif step is not None:
        refuse_half_url(step)
        head, slash, last = step.rstrip("/").rpartition("/")
        number = step_of(last)
        if number is not None:
            root = (head or "/") if slash else root
        elif "://" in step or Path(step).is_dir():
            root = step
        else:
            raise UsageError(
                f"{step!r} is no step: give a number, <root>/step-<n>, or a folder of checkpoints"
            )
    store = _store(root)
    if number is None and newest_of_all:
        number = _newest(store)
    return open_checkpoint(store, None if number is None else Step(number))


def _newest(store: "Store") -> int | None:
    """The newest step that was committed, whatever has become of it."""
    from ftkit.checkpoint.persist.checkpoint import steps
    from ftkit.checkpoint.persist.source import identity

    return next((s for s in reversed(steps(store)) if identity(store, s) is not None), None)


def _bytes(checkpoint: "Checkpoint") -> int:
    loose = sum(count for count, _ in checkpoint.record.files.values())
    return sum(r.bytes for r in checkpoint.rows) + loose


def _date(seconds: float | None) -> str:
    """In local time; empty where there is none, or none that a calendar has."""
    with suppress(OverflowError, ValueError, OSError):
        return "" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"
    return ""


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _table(heads: list[str], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*heads, box=None)
    for row in rows:
        table.add_row(*map(Text, row))  # names and errors are not markup
    # Wide when nobody looks, so that what reads the lines finds them whole.
    console = Console()
    (console if console.is_terminal else Console(width=10_000)).print(table)


@contextmanager
def _bars(what: str, *, quiet: bool) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """Gives what makes a bar of so many bytes; it shows on a terminal alone."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    console = Console(stderr=True)
    columns = TextColumn(what), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn()
    silent = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=silent) as shown:

        def begin(total: int) -> Callable[[int], None]:
            task = shown.add_task(what, total=total)
            return lambda count: shown.update(task, advance=count)

        yield begin


@contextmanager
def _bar(what: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    with _bars(what, quiet=quiet) as begin:
        yield begin(total)
