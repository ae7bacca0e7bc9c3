"""Each guard forbids what it is there for, in words that say why, and nothing else."""

from dataclasses import replace

import pytest

from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.launch.programme.guards import refusal
from ftkit.launch.programme.job_state import JobState, OpenAccusations
from ftkit.launch.programme.targets import choose, targets
from ftkit.recovery.facts import Stage
from ftkit.recovery.plan import Assignment, Mode, Stop
from tests.launch.programme.jobs import GENERATION, GUARDS, job, member, plan, target


def why(state: JobState, *, aim=None, guards=GUARDS, spent_s=0.0, expected_s=60.0) -> str:
    return refusal(guards, state, aim or target(), spent_s=spent_s, expected_s=expected_s)


def test_a_job_in_which_all_is_well_may_be_struck() -> None:
    assert why(job()) == ""


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (job(silent={1: "refused"}), "node 1 does not answer: refused"),
        (job(plan(world=None)), "no world has been formed"),
        (job(plan(mode=Mode.HALTING)), "the job is halting"),
        (job(plan(mode=Mode.ENDED, stop=Stop(code=0, reason="done"))), "the job is over: done"),
        (job(nodes={2: {"order": (0, 6)}}), "nodes [2] do not have the newest plan"),
        (job(nodes={1: {"led": False}}), "nodes [1] hear of no coordinator"),
        (job(nodes={1: {"draining": True}}), "nodes [1] are about to be taken away"),
        (job(plan(2)), "2 of 3 ranks train"),
        (job(members={1: member(1, stage=Stage.HALTED)}), "1 ranks of the world are not active"),
        (job(members={1: member(1, generation=Generation(2))}), "1 ranks of the world are not"),
        (job(nodes={1: {"members": ()}}), "1 ranks of the world are not active"),
        (job(plan(evicted={MemberId(9): "gone"})), "somebody is on the way"),
        (job(members={n: member(n, stepping=False) for n in range(3)}), "does not play its steps"),
        (job(accusations=("rank 2 is called slow: 2 times",)), "rank 2 is called slow"),
        (job(members={2: member(2, at_step=Step(100))}), "99 steps were committed"),
        (job(members={2: member(2, entry_step=Step(401))}), "99 steps were committed"),
        (job(plan(step=Step(450))), "50 steps were committed"),
    ],
)
def test_a_job_that_is_not_well_or_was_disturbed_is_left_alone(state, words) -> None:
    assert words in why(state)


def test_the_plan_may_come_from_any_node() -> None:
    assert why(job(nodes={0: {"plan": None}, 1: {"plan": plan()}})) == ""


def test_nobody_is_struck_where_nobody_would_be_left() -> None:
    alone = job(nodes={n: {"members": tuple(member(m, node=NodeId(0)) for m in range(3)) if not n
                           else ()} for n in range(3)})  # fmt: skip
    (aim,) = targets("lose-node", alone)
    assert "leaves nobody" in why(alone, aim=aim)
    assert why(alone, aim=targets("kill", alone)[0]) == ""
    assert "nobody trains" in refusal(GUARDS, job(), None, spent_s=0, expected_s=0)


def test_a_node_with_shards_is_lost_only_where_parity_has_them() -> None:
    sharded = job(members={n: member(n, sharded=True) for n in range(3)})
    assert "keeps no parity" in why(sharded, aim=target("lose-node"))
    assert why(sharded, aim=target("lose-node"), guards=replace(GUARDS, parity="2+1")) == ""
    assert why(sharded, aim=target("kill")) == ""
    assert why(sharded, aim=target("preempt")) == ""


def test_only_with_spares_takes_spares_that_are_connected() -> None:
    careful = replace(GUARDS, only_with_spares=True)
    assert why(job(), guards=careful) == "0 spare ranks stand by, 1 are wanted"
    seat = Assignment(seat=Seat(7), node=NodeId(2), member=MemberId(7))
    held = plan(seats=(*plan().seats, seat))
    standing = member(7, node=NodeId(2), stage=Stage.LINKED, linked=GENERATION)
    with_one = job(held, nodes={2: {"members": (member(2), standing)}})
    assert why(with_one, guards=careful) == ""
    # A spare on the node that is lost is lost with it, and there is no other node.
    assert "0 spare ranks" in why(with_one, aim=target("lose-node", 2), guards=careful)
    assert why(with_one, aim=target("lose-node", 1), guards=careful) == ""
    stale = replace(standing, linked=Generation(GENERATION - 1))
    behind = job(held, nodes={2: {"members": (member(2), stale)}})
    assert "0 spare ranks" in why(behind, guards=careful)


def test_a_spare_node_will_do_for_a_node() -> None:
    careful = replace(GUARDS, only_with_spares=True)
    two = plan(2)
    state = replace(job(two), seats=2)
    assert state.spare_nodes == {2}
    assert why(state, aim=target("preempt", 1), guards=careful) == ""
    assert "0 spare ranks" in why(state, aim=target("kill", 1), guards=careful)


def test_the_budget_is_what_is_spent_and_what_is_expected() -> None:
    assert why(job(), spent_s=240, expected_s=60) == ""
    assert "drills have cost 240.5 s" in why(job(), spent_s=240.5, expected_s=60)


def test_what_is_said_of_somebody_holds_until_it_is_over_or_he_is_gone() -> None:
    def word(kind: str, who: int, **more: object) -> dict[str, object]:
        return {"kind": kind, "fault": "slow", "member": who, "seat": who, "reason": "so"} | more

    said = OpenAccusations()
    said.feed([word("verdict", 1), word("suspicion", 2), {"kind": "verdict"}, {"kind": "halt"}])
    everybody = [MemberId(n) for n in range(3)]
    assert said.of(everybody) == ("rank 1 is called slow: so", "rank 2 is called slow: so")
    said.feed([word("verdict-over", 2)])
    assert said.of(everybody) == ("rank 1 is called slow: so",)
    assert said.of([MemberId(0), MemberId(5)]) == ()
    # The next coordinator knows nothing of it; what an older one says late is not heard.
    said.feed([word("verdict", 2, coordinator=2), word("verdict", 0, coordinator=1)])
    assert said.of(everybody) == ("rank 2 is called slow: so",)


def test_the_dice_strike_everybody_in_the_end_and_the_same_each_time() -> None:
    picked = [choose("kill", job(), seed=0, number=n) for n in range(40)]
    assert {one.seats for one in picked if one} == {(0,), (1,), (2,)}
    assert choose("kill", job(), seed=0, number=5) == choose("kill", job(), seed=0, number=5)
    assert choose("kill", job(plan(world=None)), seed=0, number=5) is None


def test_a_fault_of_a_node_strikes_all_that_train_there_and_no_spare() -> None:
    spare = member(7, node=NodeId(1), stage=Stage.LINKED, linked=GENERATION)
    state = job(nodes={1: {"members": (member(1), spare)}})
    aims = targets("preempt", state)
    assert [(a.node, a.members) for a in aims] == [(0, (0,)), (1, (1,)), (2, (2,))]
    assert [a.beside for a in aims] == [(), (7,), ()]
