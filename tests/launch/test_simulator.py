"""The whole job, simulated: whatever breaks, nothing wrong is committed, and it recovers."""

import json
import os
from dataclasses import replace

import pytest

from ftkit.core.ids import Generation, Term
from ftkit.core.verdict import Fault as Wrong
from ftkit.launch import judge, simulator, simulator_hosts, simulator_rank
from ftkit.launch.simulator import FOREVER, HEALED_S, SimulatedEnd, Simulation
from ftkit.launch.simulator_checks import Checker, SimulationFailure, TrainingState, slots_of
from ftkit.launch.simulator_faults import Fault, Kind
from ftkit.launch.simulator_network import Exchange
from ftkit.launch.simulator_seeds import main, play_all
from ftkit.recovery import plan as plan_module
from ftkit.recovery import protocol
from ftkit.recovery.budget import BudgetConfig
from ftkit.recovery.member import Duty
from ftkit.recovery.plan import Plan
from ftkit.recovery.vote import Tally


def play(seeds: range) -> list[SimulatedEnd]:
    return [Simulation(seed).run() for seed in seeds]


def test_a_thousand_seeds_hold() -> None:
    processors = len(os.sched_getaffinity(0))
    played = dict(play_all(range(1000), ranks=None, processes=processors))
    assert {seed: said for seed, said in played.items() if isinstance(said, str)} == {}
    ended = [outcome for outcome in played.values() if isinstance(outcome, SimulatedEnd)]
    assert len(ended) == 1000
    # One in nine has no fault in its schedule, others end before the first one is due.
    assert sum(o.faults > 0 for o in ended) > 700
    assert sum(o.restarts for o in ended) > 500
    # A budget that is tight, or shards that are lost without parity, end a job by rights.
    assert sum(o.stop.code == 0 for o in ended) > 850, "and nearly all got to their end"
    # Most stops are shorter than a stall, or come before anybody is warm.
    assert sum(o.verdicts.get(Wrong.STOPPED, 0) for o in ended) >= 5


def test_the_same_seed_is_the_same_job() -> None:
    assert Simulation(7).run() == Simulation(7).run()


def test_an_undisturbed_job_replaces_nobody() -> None:
    for seed in range(20):
        outcome = Simulation(seed, faults=[]).run()
        assert (outcome.stop.code, outcome.restarts, outcome.faults) == (0, 0, 0)
        assert not outcome.verdicts, "nobody is accused of anything"


@pytest.mark.parametrize(("seconds", "evicted"), [(1.0, False), (6.0, True)])
def test_the_detector_tells_a_pause_from_a_stop(seconds: float, evicted: bool) -> None:
    said = []
    for seed in range(10):
        stop = Fault(kind=Kind.STOP_RANK, target=0, duration_s=seconds, point="committed", nth=10)
        job = Simulation(seed, faults=[stop])
        job.endless, job.until, job.step_s = False, 40, 0.2
        outcome = job.run()
        if job.size > 1 and outcome.faults:
            said.append((Wrong.STOPPED in outcome.verdicts, outcome.restarts))
    assert len(said) > 5
    assert set(said) == {(evicted, int(evicted))}


def test_a_hundred_ranks_lose_one() -> None:
    kill = Fault(kind=Kind.KILL_RANK, target=5, point="committed", nth=50)
    job = Simulation(0, ranks=100, faults=[kill])
    job.endless, job.until = False, 3
    outcome = job.run()
    assert (outcome.stop.code, outcome.faults, outcome.restarts) == (0, 1, 1)


def test_half_of_many_ranks_are_lost_at_once() -> None:
    kill = Fault(kind=Kind.KILL_SEVERAL, target=5, point="committed", nth=1000)
    job = Simulation(0, ranks=400, faults=[kill])
    job.endless, job.until, job.step_s = False, 5, 0.3
    outcome = job.run()
    assert (outcome.stop.code, outcome.restarts) == (0, 201)


def test_what_a_rank_costs_does_not_grow_with_the_job() -> None:
    def events(ranks: int) -> float:
        kill = Fault(kind=Kind.KILL_SEVERAL, target=5, point="committed", nth=3 * ranks)
        job = Simulation(1, ranks=ranks, faults=[kill])
        job.endless, job.until, job.step_s = False, 6, 0.3
        return job.run().events / ranks

    assert events(240) < 1.2 * events(48)


@pytest.mark.parametrize("kind", Kind)
def test_every_fault_alone_at_every_ballot(kind: Kind) -> None:
    struck = 0
    for nth in range(1, 13):
        for target in (0, 1):
            fault = Fault(kind=kind, target=target, duration_s=2.0, point="ballot", nth=nth)
            struck += Simulation(nth, faults=[fault]).run().faults
    assert struck


def hangs_after_a_loss(seed: int, point: str = "halted", nth: int = 1) -> Simulation:
    """A job of four ranks that loses one; then the script of another hangs."""
    kill = Fault(kind=Kind.KILL_RANK, target=1, point="committed", nth=13)
    hang = Fault(kind=Kind.HANG_RANK, target=0, point=point, nth=nth)
    job = Simulation(seed, ranks=4, faults=[kill, hang])
    job.endless, job.until, job.step_s = True, FOREVER, 0.3
    return job


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("point", "nth"), [("committed", 14), ("halted", 1), ("entered", 6)])
def test_a_rank_whose_script_hangs_is_replaced(
    point: str, nth: int, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator, "SHARDED", float(sharded))
    for seed in range(4):
        outcome = hangs_after_a_loss(seed, point, nth).run()
        assert (outcome.stop.code, outcome.faults) == (0, 2)
        assert outcome.restarts >= 2, "and those that it kept from loading their shards"


@pytest.mark.parametrize(("sharded", "alone"), [(False, 0), (True, 1)])
def test_one_that_hangs_alone_makes_way_for_its_replacement(
    sharded: bool, alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two ranks one is killed, and the script of the other hangs before it is back."""
    monkeypatch.setattr(simulator, "SHARDED", float(sharded))
    kill = Fault(kind=Kind.KILL_RANK, target=1, point="committed", nth=14)
    hang = Fault(kind=Kind.HANG_RANK, target=3, point="committed", nth=15)

    def job(seed: int) -> Simulation:
        made = Simulation(seed, ranks=2, faults=[kill, hang])
        made.endless, made.until, made.step_s = True, FOREVER, 0.3
        return made

    for seed in range(8):
        outcome = job(seed).run()
        assert (outcome.stop.code, outcome.faults) == (0, 2)
    monkeypatch.setattr(judge, "keeps_out", lambda *_: {})
    with pytest.raises(SimulationFailure, match="no end within"):
        job(alone).run()


@pytest.mark.parametrize(("sharded", "judged"), [(False, "latecomers"), (True, "restless")])
def test_one_that_hangs_as_the_others_halt_is_waited_for_in_vain(
    sharded: bool, judged: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its control thread says where it stands: it is no silence that gives it away."""
    monkeypatch.setattr(simulator, "SHARDED", float(sharded))
    assert hangs_after_a_loss(1).run().stop.code == 0
    monkeypatch.setattr(judge, judged, lambda *_, **__: {})
    with pytest.raises(SimulationFailure, match="no end within"):
        hangs_after_a_loss(1).run()


def cut_for_good(seed: int, *, cuts_max: int = 3) -> Simulation:
    """A job of at least three ranks, two of which lose each other until it ends."""
    cut = Fault(kind=Kind.CUT_LINK, target=0, duration_s=100.0, point="committed", nth=12)
    job = Simulation(seed, faults=[cut])
    job.endless, job.until, job.step_s = False, 16, 0.05
    job.budget = BudgetConfig(same_place_max=1000, restarts_max=1000, cuts_max=cuts_max)
    return job


def test_two_ranks_that_cannot_reach_each_other_do_not_keep_the_job_from_training() -> None:
    seeds = [s for s in range(40) if cut_for_good(s).size > 2]
    cut = []
    for seed in seeds:
        outcome = cut_for_good(seed).run()
        cut += [seed] if outcome.restarts else []  # else the cut came when all but done
        assert outcome.stop.code == 0
        assert outcome.virtual_s < HEALED_S, "it got to its end while the cut lasted"
        assert outcome.worlds < 12, "a few attempts, an eviction, and the rest train on"
    # Nobody is evicted: world after world is formed in vain until the cut is mended.
    in_vain = [cut_for_good(seed, cuts_max=10**6).run() for seed in cut[:3]]
    assert len(cut) > 10
    assert all(o.virtual_s > HEALED_S and o.worlds > 40 for o in in_vain)


def test_members_lost_with_all_who_knew_them_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the boot in the plan the new agent is waited for, to tell of what it cannot know."""
    fault = Fault(kind=Kind.LOSE_NODE_AND_COORDINATOR, target=0, point="committed", nth=3)
    seeds = [s for s in range(20) if Simulation(s).nodes > 1]
    assert all(Simulation(s, faults=[fault]).run().restarts for s in seeds)
    monkeypatch.setattr(protocol, "_lost_with_agent", lambda seat, facts: False)
    with pytest.raises(SimulationFailure):
        _ = [Simulation(seed, faults=[fault]).run() for seed in seeds]


def test_a_member_that_only_a_lost_plan_knew_of_is_not_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An agent dies with the coordinator, and with the only plan that said what it had started."""
    lost = Fault(kind=Kind.LOSE_NODE_AND_COORDINATOR, target=0, point="spawned", nth=1)
    seeds = (5, 39, 54)
    assert all(Simulation(s, ranks=14, faults=[lost]).run().stop.code == 0 for s in seeds)
    real = plan_module.adopt

    def adopt(copies: list[Plan], *, term: Term) -> Plan:
        return replace(real(copies, term=term), seats=max(copies, key=lambda p: p.order).seats)

    monkeypatch.setattr(simulator_hosts, "adopt", adopt)
    for seed in seeds:
        with pytest.raises(SimulationFailure, match="spawned twice"):
            Simulation(seed, ranks=14, faults=[lost]).run()


def test_a_rank_that_waits_for_nobody_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_rank, "tally", lambda ballots: Tally())
    monkeypatch.setattr(Exchange, "missing", lambda self: 0)
    with pytest.raises(SimulationFailure, match="reduced slots"):
        play(range(20))


def test_a_failure_says_how_to_replay_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_rank, "react", lambda me, plan: (Duty.NOTHING, None))
    with pytest.raises(SimulationFailure) as caught:
        Simulation(3).run()
    words = str(caught.value)
    assert "--seed 3 -v" in words
    assert "seed 3 at" in words
    assert "no end within" in words


def test_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--seed", "5", "-v"]) == 0
    assert "commit" in capsys.readouterr().out
    monkeypatch.setattr(simulator_rank, "react", lambda me, plan: (Duty.NOTHING, None))
    assert main(["--seed", "5"]) == 1
    assert "replay" in capsys.readouterr().err


def test_many_seeds_are_played_by_several_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "6", "--ranks", "12", "--processes", "2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["seeds"], told["ranks"], told["largest"]) == (6, 72, 12)
    assert told["violations"] == {}
    assert sum(told["codes"].values()) == 6
    assert told["faults"] > 0


def test_a_seed_that_fails_is_in_the_count_of_many(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator_rank, "react", lambda me, plan: (Duty.NOTHING, None))
    assert main(["--seeds", "2", "--ranks", "4", "--processes", "1"]) == 1
    said = capsys.readouterr()
    assert "2 seeds, 2 violations" in said.out
    assert "--seed 1 -v --ranks 4" in said.err


@pytest.mark.parametrize("size", range(1, 9))
@pytest.mark.parametrize("slots", range(1, 9))
def test_slots_are_shared_out_exactly_once(size: int, slots: int) -> None:
    shares = [slot for rank in range(size) for slot in slots_of(rank, size, slots)]
    assert shares == list(range(slots))


def test_lineage_tells_attempts_apart_and_state_does_not() -> None:
    one, other = (TrainingState().after(Generation(g)) for g in (1, 2))
    assert one.state == other.state == Checker(1).reference(one.step)
    assert one.lineage != other.lineage
