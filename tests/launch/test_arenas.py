"""A node's shared memory: who owns a folder, and what is cleared away when nobody does."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil
import pytest

from ftkit.checkpoint import pages
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.numa import MemoryNode
from ftkit.checkpoint.slabs import Sealed, choose_slab
from ftkit.core.clock import MonotonicClock
from ftkit.core.errors import ProtocolError, UsageError
from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.core.process_stat import start_ticks
from ftkit.detection.recorder import Recorder
from ftkit.detection.signals import StepSeen, from_json
from ftkit.detection.status import BOARD, StatusBoard
from ftkit.launch import arenas as arenas_module
from ftkit.launch.arenas import OWNER, Arenas, sweep
from ftkit.launch.config import JobConfig
from ftkit.recovery.facts import MemberFacts, Stage


def config(root: Path) -> JobConfig:
    return JobConfig(job="ab12", command=("x",), nproc=2, shm_root=str(root))


def test_the_folder_is_ours_alone_and_goes_with_everything_in_it(tmp_path: Path) -> None:
    arenas = Arenas(config(tmp_path), NodeId(1))
    assert arenas.directory == tmp_path / "ftkit-ab12-n1"
    assert arenas.directory.stat().st_mode & 0o777 == 0o700
    (arenas.directory / "more").mkdir()
    arenas.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_second_agent_of_the_same_node_is_refused(tmp_path: Path) -> None:
    arenas = Arenas(config(tmp_path), NodeId(0))
    with pytest.raises(FileExistsError):
        Arenas(config(tmp_path), NodeId(0))
    arenas.remove()


@pytest.mark.parametrize("root", ["missing", "a-file"])
def test_a_root_that_is_no_folder_is_named_and_not_made(tmp_path: Path, root: str) -> None:
    (tmp_path / "a-file").touch()
    with pytest.raises(UsageError, match=f"--shm-root .*/{root} is no directory"):
        Arenas(config(tmp_path / root), NodeId(0))
    assert not (tmp_path / "missing").exists()


def test_the_folders_of_the_dead_are_swept_and_no_others(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        born, ours, our_start = start_ticks(child.pid), os.getpid(), start_ticks(os.getpid())
        assert our_start is not None
        owners = {
            "ftkit-dead-n0": f"{child.pid} {born}",
            "ftkit-reused-n0": f"{ours} {our_start - 100}",
            "ftkit-running-n0": f"{ours} {our_start}",
            "ftkit-odd-n0": "no number",
            "ftkit-torn-n0": "",
            "ftkit-number-n0": str(ours),
        }
        for name, owner in owners.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / OWNER).write_text(owner)
        (tmp_path / "ftkit-unborn-n0").mkdir()
        (tmp_path / "other").mkdir()
        assert {p.name for p in sweep(tmp_path)} == {"ftkit-reused-n0"}
        child.kill()
        # Not waited for: it is a zombie, as an orphan is that nobody asks after.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
        assert {p.name for p in sweep(tmp_path)} == {"ftkit-dead-n0"}
    assert {p.name for p in tmp_path.iterdir()} == {
        *("ftkit-running-n0", "ftkit-odd-n0", "ftkit-torn-n0", "ftkit-number-n0"),
        *("ftkit-unborn-n0", "other"),
    }


def test_what_is_no_arena_holds_no_snapshot_and_no_row_is_made_up(tmp_path: Path) -> None:
    arenas = Arenas(config(tmp_path), NodeId(1))
    (arenas.directory / "ftkit-ab12-3.arena").write_bytes(b"torn")
    assert arenas.copies() == []
    silent = MemberFacts(
        member=MemberId(2), seat=Seat(2), node=NodeId(1), stage=Stage.ACTIVE, pid=os.getpid()
    )
    assert arenas.rows([silent]) == []
    arenas.remove()


def test_steps_are_read_once_and_the_last_ones_after_a_death(tmp_path: Path) -> None:
    arenas = Arenas(config(tmp_path), NodeId(1))
    facts = MemberFacts(member=MemberId(9), seat=Seat(3), node=NodeId(1), stage=Stage.ACTIVE, pid=1)
    with StatusBoard.open(arenas.directory / BOARD) as board:
        recorder = Recorder(board.attach(1, MemberId(9)), MonotonicClock())
        read: list[Any] = []
        for step in (1, 2, 3):
            recorder.step(Step(step))
            recorder.finish(slots=2, loss=1.0)
            if step < 3:
                read.append(arenas.steps([facts]))
        heir = board.attach(1, MemberId(10))
        assert heir.member == 10
        read.append(arenas.steps([replace(facts, stage=Stage.DEAD)]))
    assert [[s["step"] for s in some] for some in read] == [[1], [2], [3]]
    seen = from_json(read[0][0])
    assert isinstance(seen, StepSeen)
    assert (seen.member, seen.seat, seen.slots) == (9, 3, 2)
    assert arenas.steps([facts]) == []
    arenas.remove()


def test_an_arena_is_made_for_a_layout_and_for_nothing_else(tmp_path: Path) -> None:
    arenas = Arenas(config(tmp_path), NodeId(1))
    with pytest.raises(ProtocolError):
        arenas.ensure(Seat(3), {"entries": "none"}, 1)
    path = arenas.ensure(Seat(3), StateLayout.of([]).to_json(), 1)
    assert path.name == "ftkit-ab12-3.arena"
    assert path.parent == arenas.directory
    assert path.stat().st_mode & 0o777 == 0o600
    assert arenas.copies() == []
    arenas.remove()


@pytest.mark.parametrize(
    ("setting", "gpu_node", "node"),
    [("auto", None, 1), ("auto", 0, 0), ("0", None, 0), ("off", 0, None)],
)
def test_an_arena_lies_where_its_rank_runs_or_its_gpu_hangs(
    setting: str, gpu_node: int | None, node: int | None,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    mine = frozenset(os.sched_getaffinity(0))
    nodes = [MemoryNode(0, frozenset({10_000})), MemoryNode(1, mine)]
    asked = list[int]()
    monkeypatch.setattr(arenas_module, "memory_nodes", lambda: nodes)

    def prefer(address: int, count: int, number: int) -> str:
        asked.append(number)
        return ""

    monkeypatch.setattr(pages, "prefer", prefer)
    arenas = Arenas(replace(config(tmp_path), numa=setting), NodeId(1))
    arenas.ensure(Seat(3), StateLayout.of([]).to_json(), 1, pid=os.getpid(), gpu_node=gpu_node)
    arenas.remove()
    assert asked == ([] if node is None else [node])


def test_a_memory_node_that_is_not_there_is_refused_before_anything_is_made(
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match="--numa 77"):
        Arenas(replace(config(tmp_path), numa="77"), NodeId(0))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="--numa"):
        replace(config(tmp_path), numa="near")


@pytest.mark.parametrize(("parity", "disk"), [("", ""), ("1+1", ""), ("", "/d"), ("1+1", "/d")])
def test_whatever_the_tiers_below_pin_a_capture_finds_a_slab(
    tmp_path: Path, parity: str, disk: str
) -> None:
    given = replace(
        config(tmp_path), nodes=2, parity=parity, checkpoint_dir=disk, checkpoint_every=bool(disk)
    )
    arenas = Arenas(given, NodeId(0))
    held = [Sealed(generation=Generation(1), step=Step(s)) for s in range(arenas.slabs)]
    # Parity holds the round that counts and the one being made; the disk the snapshot that is
    # written, and by then there may be one that is due.
    pins = 2 * bool(parity) + 2 * bool(disk)
    for pinned in combinations(range(arenas.slabs), pins):
        assert choose_slab(held, None, pinned) is not None
    arenas.remove()
