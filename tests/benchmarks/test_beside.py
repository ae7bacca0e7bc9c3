"""`ftkit bench peers`: what step logs say, the table, what is refused, and two tools for real."""

import contextlib
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import ftkit
from benchmarks.beside import bench, page, run, tools
from benchmarks.beside.environments import Environment, last_words, release
from benchmarks.beside.rows import HEADER, Calm, Distance, Row, Struck, cells, problems, remarks
from benchmarks.beside.steplog import Batches, Recovery, batches, intervals, recovery
from benchmarks.beside.task import Task, batch_loss
from benchmarks.peers import NoPeer
from benchmarks.toy import Noise, build
from ftkit.core import exit_codes
from ftkit.launch import bench_command
from ftkit.launch.cli import main

Events = list[dict[str, Any]]


def begin(mono: float, step: int) -> dict[str, Any]:
    return {"kind": "begin", "mono": mono, "step": step}


def commits(rank: int, moments: dict[float, int], *, ranks: int = 3) -> Events:
    """Finished steps of a rank of `ranks`, with its block of each."""
    return [
        {"kind": "commit", "mono": mono, "step": step, "blocks": [(step - 1) * ranks + rank]}
        for mono, step in moments.items()
    ]


def strike(mono: float, step: int) -> dict[str, Any]:
    return {"kind": "strike", "mono": mono, "step": step}


#: Rank 2 is struck at 2.5 in step 3; rank 1 is a moment behind with step 2.
STRUCK = {
    10: [begin(0.0, 1), *commits(0, {1.0: 1, 2.0: 2})],
    11: [begin(0.0, 1), *commits(1, {1.0: 1, 2.6: 2})],
    12: [begin(0.0, 1), *commits(2, {1.0: 1, 2.0: 2}), strike(2.5, 3)],
}


def after(extra: dict[int, Events]) -> dict[int, Events]:
    return {pid: [*STRUCK.get(pid, []), *extra.get(pid, [])] for pid in {*STRUCK, *extra}}


def test_survivors_that_go_on_are_timed_until_the_last_of_them_has_a_step():
    logs = after({10: commits(0, {2.7: 3}), 11: commits(1, {2.9: 3})})
    assert recovery(logs) == Recovery(again_s=0.4, ahead_s=0.4, survivors_lost=0, repeated=0)


def test_a_step_that_was_old_when_the_fault_came_is_no_recovery():
    assert recovery(STRUCK).again_s is None


def test_a_newcomer_does_not_prolong_the_survivors_recovery():
    logs = after({10: commits(0, {2.7: 3}), 11: commits(1, {2.9: 3})})
    logs[13] = [begin(2.65, 4), *commits(2, {9.0: 9})]
    assert recovery(logs).again_s == 0.4


def test_a_survivor_that_never_trains_on_is_counted():
    found = recovery(after({10: commits(0, {2.7: 3})}))
    assert (found.again_s, found.survivors_lost) == (0.2, 1)


def test_processes_started_again_are_timed_together_and_their_steps_counted_again():
    logs = after({})
    for rank in range(3):
        # Back to step 2; all are there before the first of them is through.
        logs[20 + rank] = [begin(7.0, 2), *commits(rank, {8.0 + rank / 10: 2, 9.0 + rank / 10: 3})]
    assert recovery(logs) == Recovery(again_s=5.7, ahead_s=6.7, survivors_lost=0, repeated=1)


def test_a_restart_in_the_same_process_is_told_by_its_new_beginning():
    again = [begin(3.5, 2)]
    logs = after(
        {10: [*again, *commits(0, {4.0: 2, 4.5: 3})], 11: [*again, *commits(1, {4.1: 2, 4.6: 3})]}
    )
    assert recovery(logs) == Recovery(again_s=1.6, ahead_s=2.1, survivors_lost=0, repeated=1)


def test_a_restart_that_fails_before_the_struck_step_is_not_ahead():
    logs = after({20: [begin(7.0, 1), *commits(0, {8.0: 1})]})
    found = recovery(logs)
    assert (found.again_s, found.ahead_s) == (5.5, None)


def test_without_a_fault_there_is_nothing_to_recover_from():
    with pytest.raises(ValueError, match="no process says"):
        recovery({10: [begin(0.0, 1)]})


def test_batches_that_no_finished_step_holds_are_lost_and_repeated_ones_count_once():
    # Survivors go on without rank 2's blocks: one of step 3 is lost.
    logs = after({10: commits(0, {2.7: 3}), 11: commits(1, {2.9: 3})})
    assert batches(logs, slots=3) == Batches(steps=3, lost=1, doubled=0)
    # All of step 2 again, by two ranks: what it was made of the first time does not count.
    again = {"kind": "commit", "mono": 4.0, "step": 2, "blocks": [3, 5]}
    other = {"kind": "commit", "mono": 4.0, "step": 2, "blocks": [4, 5]}
    logs = after({10: [begin(3.0, 2), again], 11: [begin(3.0, 2), other]})
    assert batches(logs, slots=3) == Batches(steps=2, lost=0, doubled=1)


def test_intervals_leave_the_first_steps_out():
    moments = {float(n): n for n in range(1, 13)} | {20.0: 13}
    assert intervals({1: commits(0, moments)}) == [1.0, 8.0]


def task(tmp_path: Path | str = "/nowhere", **given: Any) -> Task:
    usual: dict[str, Any] = {"steps": 16, "slots": 3, "rows": 4, "save_every": 5, "stall_s": 5.0}
    return Task(folder=str(tmp_path), **usual | given)


def test_a_task_reaches_its_ranks(monkeypatch):
    sent = task(fault="kill", victim=1, strike=7)
    monkeypatch.setenv(*next(iter(sent.to_environ().items())))
    assert Task.from_environ() == sent


@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_world_shares_the_same_global_batch(world):
    shares = [task().mine(4, rank, world) for rank in range(world)]
    assert sorted(block for share in shares for block in share) == [9, 10, 11]


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_that_play_several_blocks_reach_the_full_worlds_gradient(world):
    def gradient(ranks: int) -> torch.Tensor:
        whole = list[torch.Tensor]()
        for rank in range(ranks):
            model = build()
            blocks = task().mine(2, rank, ranks)
            batch_loss(task(), model, Noise(4), blocks, ranks).backward()
            parts = [p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]
            whole.append(torch.cat(parts))
        return torch.stack(whole).mean(0)  # as DDP does

    torch.testing.assert_close(gradient(world), gradient(3))


NEAR = Distance(same_bits=True, largest=0.0, relative=0.0)
FAR = Distance(same_bits=False, largest=0.5, relative=0.02)


def calm(**given: Any) -> Calm:
    times: dict[str, Any] = {"step_s": 0.02, "mean_step_s": 0.03}
    usual = times | {"rank_mib": 300.0, "job_mib": 900.0, "digest": "aa", "from_plain": NEAR}
    return Calm(**usual | given)


def struck(**given: Any) -> Struck:
    usual: dict[str, Any] = {
        "victim": 2,
        "step": 43,
        "recovery": Recovery(again_s=0.1, ahead_s=0.1, survivors_lost=0, repeated=0),
        "batches": Batches(steps=60, lost=0, doubled=0),
        "finished": 3,
        "ranks_agree": True,
        "from_calm": NEAR,
        "digest": "aa",
        "why": "all its ranks ended",
    }
    return Struck(**usual | given)


NEVER = struck(
    recovery=Recovery(again_s=None, ahead_s=None, survivors_lost=0, repeated=0),
    finished=0,
    from_calm=None,
    ranks_agree=None,
    why="no step was finished for 60 s; RuntimeError: <refused>",
)


def table(**others: Row) -> dict[str, Row]:
    rows = {
        "plain DDP": Row(name="plain DDP", how="", calm=[calm(step_s=0.01, from_plain=None)]),
        "ftkit": Row(name="ftkit", how="its defaults", calm=[calm()], struck=[struck()]),
    }
    return rows | {row.name: row for row in others.values()}


def test_a_row_shows_medians_ratios_and_how_many_recovered():
    slow = Recovery(again_s=5.0, ahead_s=6.0, survivors_lost=0, repeated=4)
    row = Row(name="x", how="", calm=[calm()], struck=[struck(), struck(recovery=slow), NEVER])
    shown = dict(zip(HEADER, cells(row, table()["plain DDP"]), strict=True))
    assert shown["recovered"] == "2 of 3"
    assert shown["a step again"] == "2.55 s"
    assert shown["steps repeated"] == "0..4"
    assert (shown["step"], shown["with saves"]) == ("2.00x", "1.00x")
    assert shown["final parameters"] == "same bits"


def test_the_worst_final_parameters_are_shown():
    def verdict(*runs: Struck) -> str:
        row = Row(name="x", how="", struck=runs)
        return cells(row, row)[HEADER.index("final parameters")]

    assert verdict(struck(), struck(from_calm=FAR)) == "off by 2e-02"
    assert verdict(struck(), struck(ranks_agree=False)) == "ranks differ"
    assert verdict(NEVER) == "-"


def test_remarks_say_what_went_wrong_and_what_differs():
    lost = struck(from_calm=FAR, finished=2, batches=Batches(steps=60, lost=18, doubled=0))
    said = "\n".join(remarks(Row(name="x", how="patched", struck=[NEVER, lost]), ranks=3))
    assert "patched" in said
    assert "nobody trained on: no step was finished for 60 s" in said
    assert "18 batches are in no step; 2 of 3 ranks at the end" in said


def test_ftkit_breaking_its_promise_is_a_problem_and_a_peers_failure_is_not():
    peer = Row(name="torchrun", how="", calm=[calm()], struck=[NEVER], trouble="no wheel for this")
    assert problems(table(peer=peer)) == []
    for bad in (struck(from_calm=FAR), struck(ranks_agree=False), NEVER):
        rows = table(ours=Row(name="ftkit", how="", calm=[calm()], struck=[bad]))
        assert len(problems(rows)) == 1
    rows = table(ours=Row(name="ftkit", how="", calm=[calm(from_plain=FAR)], struck=[]))
    assert "not plain DDP's training" in problems(rows)[0]
    rows = table(ours=Row(name="ftkit", how="", calm=[calm(), calm(digest="bb")], struck=[]))
    assert "different bits" in problems(rows)[0]


def test_the_page_has_every_row_and_says_never_where_nothing_came():
    absent = Row(name="Ray Train", how="", trouble="ray could not be installed: no network")
    never = Row(name="torchrun", how="", calm=[calm()], struck=[NEVER])
    rows = table(absent=absent, never=never)
    drawn = page.markdown(rows).splitlines()
    assert len(drawn) == 2 + len(rows)
    assert len({len(line) for line in drawn}) == 1
    html = page.render(rows, fault="SIGKILL", ranks=3, facts="2 cores")
    assert "ray could not be installed: no network" in html
    assert "never: no step was finished for 60 s</text>" in html
    assert "&lt;refused&gt;" in html
    assert html.count('class="again"') == 1


def test_a_plot_of_nothing_says_so():
    row = Row(name="torchrun", how="", struck=[NEVER])
    assert "No tool trained on" in page.plot([row])


def test_every_peer_of_the_command_has_a_row():
    assert bench_command.PEERS == tools.NAMES


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "torchft,rey"], "did you mean ray?"),
        (["--only", "horovod"], "'horovod' is none of torchft"),
        (["--steps", "30"], "less than twice --save-every 20"),
        (["--stall", "30"], "--time-limit 90 is less than 4 times --stall 30"),
        (["--out", "/no/such/folder/x.html"], "there is no folder /no/such/folder"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", "peers", *arguments])
    assert ended.value.code == exit_codes.USAGE
    assert words in capsys.readouterr().err


def test_without_a_clone_it_is_said_how_to_get_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ftkit, "__file__", str(tmp_path / "ftkit" / "__init__.py"))
    with pytest.raises(SystemExit) as ended:
        main(["bench", "peers"])
    assert ended.value.code == exit_codes.USAGE
    assert "clone ftkit's repository" in capsys.readouterr().err


def test_a_peer_that_cannot_be_installed_has_its_reason_in_its_row(monkeypatch, tmp_path):
    def refuse(wanted: Environment, *_: object) -> Path:
        raise NoPeer(f"{wanted.name} could not be installed: no matching distribution")

    played = list[str]()
    monkeypatch.setattr(bench, "interpreter", refuse)

    def cannot(tool: tools.Tool, *_: object, **__: object) -> run.Played:
        played.append(tool.name)
        raise FileNotFoundError("no such program")

    monkeypatch.setattr(bench, "play", cannot)
    found = bench.measure(settings(only=["ray"]), tmp_path, lambda _: None)
    assert [one.tool.name for one in found] == ["plain DDP", "ftkit", "Ray Train"]
    assert found[2].row().trouble == "ray could not be installed: no matching distribution"
    assert played == ["plain DDP", "ftkit", "ftkit"]
    assert found[1].row().trouble == "could not be run: no such program"
    assert list(tmp_path.iterdir()) == []


def settings(**given: Any) -> bench.Settings:
    usual: dict[str, Any] = {
        "only": [],
        "runs": 1,
        "fault": "kill",
        "nproc": 3,
        "steps": 16,
        "rows": 4,
        "save_every": 5,
        "stall_s": 5.0,
        "limit_s": 60.0,
        "seed": 0,
    }
    return bench.Settings(**usual | given)


def test_what_a_process_died_of_is_its_last_error():
    assert last_words("Traceback:\n  x\nValueError: bad\nW torch: bye\n") == "ValueError: bad"
    summary = "[rank0]: RuntimeError: refused\nx.errors.ChildFailedError:\n====\n"
    assert last_words(summary) == "[rank0]: RuntimeError: refused"
    assert last_words("ERROR: No matching distribution\n") == "ERROR: No matching distribution"
    bare = "RuntimeError: handled\n  assert fut._fut\n    ^^^^^\nAssertionError\n"
    assert last_words(bare) == "AssertionError at: assert fut._fut"
    assert last_words("") == "it said nothing"
    assert release("2.13.0+cpu") == "2.13.0"


def sleeper(*argv: str) -> tools.Tool:
    return tools.Tool(
        name="sleeper", peer="none", commands=lambda site: [tools.Command(argv=list(argv))]
    )


@pytest.mark.multiproc
def test_a_tool_that_stands_still_is_ended_with_its_daemons(tmp_path):
    # What the shell leaves behind is in a session of its own, and nobody's child.
    script = "(setsid sleep 1000 &); echo > up; exec sleep 1000"
    played = run.play(
        sleeper("sh", "-c", script), task(tmp_path), Path(sys.executable), limit_s=0.5
    )
    assert played.standstill
    assert played.logs == {}
    assert (tmp_path / "up").exists()
    assert not of_folder(tmp_path)


def of_folder(folder: Path) -> list[psutil.Process]:
    """Processes that run in it, or that were told of it."""
    found = list[psutil.Process]()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder) or str(folder) in str(process.environ()):
                found.append(process)
    return found


@pytest.mark.multiproc
def test_a_tool_that_fails_is_quoted(tmp_path):
    python = [sys.executable, "-c", "raise ValueError('no such rank')"]
    played = run.play(sleeper(*python), task(tmp_path), Path(sys.executable), limit_s=30)
    assert not played.standstill
    assert played.said == "ValueError: no such rank"


@pytest.mark.multiproc
@pytest.mark.parametrize(("tool", "repeated"), [("ftkit", 0), ("torchrun + DCP, own store", 1)])
def test_a_rank_is_killed_and_training_goes_on(tool, repeated, tmp_path):
    (chosen,) = [t for t in tools.TOOLS if t.name == tool]
    asked = task(
        tmp_path, fault="kill", victim=1, strike=12, save_every=5 if chosen.saves else 0, slots=2
    )
    played = run.play(chosen, asked, Path(sys.executable), limit_s=60)
    assert len(played.finals) == 2 or (len(played.finals) == 1 and not chosen.saves)
    found = recovery(played.logs)
    assert found.again_s is not None, played.said
    assert found.repeated == repeated  # of 11 steps that were done, 10 are in the checkpoint
    assert batches(played.logs, slots=2) == Batches(steps=16, lost=0, doubled=0)
    assert not of_folder(tmp_path)
