"""Events are whole lines, whatever happens to their writer."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ftkit.core.trace import Trace, read_events, read_run


def test_events_carry_time_and_context(tmp_path: Path) -> None:
    path = tmp_path / "events" / "a.jsonl"
    with Trace(path, seat=3) as trace:
        trace.event("commit", step=7)
        trace.event("exit", seat=4)
    one, two = read_events(path)
    assert (one["kind"], one["seat"], one["step"]) == ("commit", 3, 7)
    assert two["seat"] == 4, "the event's own word counts"
    assert one["mono"] <= two["mono"]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "line",
    ["5", "null", "[]", '{"kind":"a"}', '{"kind":"a","t":1,"mono":NaN}', '{"kind":"a","t":1,"mono":"1"}',
     '{"kind":["a"],"t":1,"mono":1}', '{"kind":"a","t":1,"mono":1' + "0" * 400 + "}", "[" * 100_000],
)  # fmt: skip
def test_what_is_no_event_is_left_out(tmp_path: Path, line: str) -> None:
    folder = tmp_path / "events"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"kind":"a","t":1,"mono":1}\n' + line + "\n")
    assert [e["kind"] for e in read_run(tmp_path)] == ["a"]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Trace(path) as trace:
        trace.event("one")
        trace.event("two")
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        assert [e["kind"] for e in read_events(path)] == ["one"]


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Trace(path) as trace:

        def write(n: int) -> None:
            for i in range(200):
                trace.event("x" * 300, n=n, i=i)

        threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    seen = [(e["n"], e["i"]) for e in read_events(path)]
    assert sorted(seen) == [(n, i) for n in range(4) for i in range(200)]
    for n in range(4):
        assert [i for m, i in seen if m == n] == list(range(200))


def test_a_closed_trace_and_a_full_disk_cost_no_step(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "a.jsonl")
    trace.close()
    trace.close()
    trace.event("late")
    assert list(read_events(tmp_path / "a.jsonl")) == []
    if not os.access("/dev/full", os.W_OK):
        pytest.skip("no /dev/full here")
    with Trace(Path("/dev/full")) as full:
        full.event("lost")


def test_a_run_is_read_in_order_of_time(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    for name, times in (("a", (1.0, 4.0)), ("b", (2.0, 3.0))):
        lines = [json.dumps({"mono": t, "kind": name}) + "\n" for t in times]
        (tmp_path / "events" / f"{name}.jsonl").write_text("".join(lines))
    assert [e["mono"] for e in read_run(tmp_path)] == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.multiproc
def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    script = (
        "import sys, itertools\n"
        "from pathlib import Path\n"
        "from ftkit.core.trace import Trace\n"
        "trace = Trace(Path(sys.argv[1]))\n"
        "trace.event('first')\n"
        "print('ready', flush=True)\n"
        "for i in itertools.count():\n"
        "    trace.event('more', i=i, pad='y' * 200)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        writer.send_signal(signal.SIGKILL)
    finally:
        writer.kill()
        writer.communicate(timeout=30)
    assert path.read_bytes().endswith(b"\n"), "a line is one write, so none is torn"
    events = list(read_events(path))
    assert events[0]["kind"] == "first"
    assert [e["i"] for e in events[1:]] == list(range(len(events) - 1))
