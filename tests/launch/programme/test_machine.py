"""The programme's stories by name, then random walks that keep its invariants."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ftkit.launch.programme.costs import Budget
from ftkit.launch.programme.machine import (
    End,
    Look,
    Note,
    Options,
    Phase,
    Seen,
    State,
    Strike,
    Wait,
    Watch,
    advance,
    begin,
)
from ftkit.launch.programme.record import Survival
from ftkit.launch.programme.schedule import next_interval
from ftkit.recovery.plan import Mode
from tests.launch.programme.jobs import GUARDS, drill, job, plan

HOUR = 3600.0
NOW = 1_800_000_000.0
WELL, ILL = job(), job(plan(mode=Mode.HALTING))
GOOD = (Survival.SURVIVED, "")
OPTIONS = Options(
    job="j", faults=("kill", "stop"), guards=GUARDS, seed=1, every_s=HOUR, count=2, prior_s=60
)
ONCE = replace(OPTIONS, every_s=None, count=1)


def start(options: Options = OPTIONS) -> State:
    return begin(options, NOW, patience_s=60)


def looking(options: Options = OPTIONS) -> State:
    state, command = advance(start(options), Seen(now=start(options).interval.due), options)
    assert (state.phase, command) == (Phase.LOOKING, Look())
    return state


def watching(options: Options = OPTIONS) -> State:
    state = looking(options)
    due = Seen(now=state.interval.due + 1, job=WELL, paced=True)
    state, command = advance(state, due, options)
    assert isinstance(command, Strike)
    state, command = advance(state, replace(due, answer=""), options)
    assert (state.phase, command) == (Phase.WATCHING, Watch())
    return state


def test_it_waits_for_its_moment() -> None:
    state = start()
    assert advance(state, Seen(now=NOW), OPTIONS) == (state, Wait(state.interval.due))


def test_it_looks_until_the_guards_allow_and_steps_are_seen() -> None:
    state = looking()
    for seen, reason in (
        (Seen(now=state.interval.due, job=ILL, paced=True), "the job is halting"),
        (Seen(now=state.interval.due, job=WELL), "ranks have not been seen to commit steps yet"),
    ):
        state, command = advance(state, seen, OPTIONS)
        assert (state.phase, state.refused, command) == (Phase.LOOKING, reason, Look())
    state, command = advance(state, Seen(now=state.interval.due, job=WELL, paced=True), OPTIONS)
    assert isinstance(command, Strike)
    assert command.target == state.target


def test_an_agent_that_refuses_is_asked_again_later() -> None:
    state = looking()
    seen = Seen(now=state.interval.due, job=WELL, paced=True)
    state, _ = advance(state, seen, OPTIONS)
    state, command = advance(state, replace(seen, answer="the job has moved on"), OPTIONS)
    assert (state.phase, state.refused, command) == (Phase.LOOKING, "the job has moved on", Look())
    assert isinstance(advance(state, seen, OPTIONS)[1], Strike)


def test_an_interval_that_ends_is_noted_with_the_reason() -> None:
    state = looking()
    state, _ = advance(state, Seen(now=state.interval.due, job=ILL), OPTIONS)
    after, note = advance(state, Seen(now=state.interval.ends, job=WELL, paced=True), OPTIONS)
    assert isinstance(note, Note)
    assert (note.outcome, note.reason, note.target) == (
        Survival.SKIPPED,
        "the job is halting",
        None,
    )
    assert after.phase is Phase.WAITING
    assert after.interval.number == state.interval.number + 1


def test_the_budget_is_reckoned_from_the_history() -> None:
    dear = replace(OPTIONS, guards=replace(GUARDS, budget=Budget(lost_s=70, window_s=HOUR)))
    state = looking(dear)
    seen = Seen(now=state.interval.due, job=WELL, paced=True)
    assert isinstance(advance(state, seen, dear)[1], Strike)
    before = replace(seen, history=(drill(state.interval.due - 60, "raise", lost_s=11.0),))
    assert "the budget" in advance(state, before, dear)[0].refused
    forgotten = replace(seen, history=(drill(state.interval.due - 2 * HOUR, "raise", lost_s=11.0),))
    assert isinstance(advance(state, forgotten, dear)[1], Strike)


def test_it_ends_when_enough_were_survived() -> None:
    state = watching()
    seen = Seen(now=state.interval.ends - 1, outcome=GOOD)
    state, note = advance(state, seen, OPTIONS)
    assert isinstance(note, Note)
    assert (note.outcome, state.phase, state.survived) == (Survival.SURVIVED, Phase.WAITING, 1)
    last = replace(watching(), survived=1)
    state, _ = advance(last, seen, OPTIONS)
    assert (state.phase, state.code) == (Phase.OVER, 0)
    assert advance(state, Seen(now=0), OPTIONS) == (state, End())


def test_it_ends_with_the_first_that_is_not_survived() -> None:
    for outcome, code in ((Survival.FAILED, 1), (Survival.UNKNOWN, 2)):
        state = watching()
        state, note = advance(state, Seen(now=state.interval.due, outcome=(outcome, "so")), OPTIONS)
        assert isinstance(note, Note)
        assert (state.phase, state.code, note.reason) == (Phase.OVER, code, "so")


def test_what_was_struck_is_watched_to_its_end_whoever_stops_it() -> None:
    state = watching()
    stopped = Seen(now=state.interval.due, stopped="a file is there", job_over="the job is over")
    assert advance(state, stopped, OPTIONS) == (state, Watch())
    state, _ = advance(state, replace(stopped, outcome=GOOD), OPTIONS)
    state, command = advance(state, stopped, OPTIONS)
    assert (state.phase, state.code, command) == (Phase.OVER, 0, End())


def test_it_is_stopped_before_it_strikes() -> None:
    for state in (start(), looking()):
        seen = Seen(now=state.interval.due, stopped="x is there", job=WELL, paced=True)
        state, command = advance(state, seen, OPTIONS)
        assert (state.phase, state.code, command) == (Phase.OVER, 0, End())
        assert state.reason == "drills are stopped: x is there"


def test_a_job_that_is_over_leaves_undone_what_was_asked_for() -> None:
    over = Seen(now=NOW, job_over="the job is over")
    assert advance(start(), over, OPTIONS)[0].code == 2
    assert advance(start(), over, replace(OPTIONS, count=None))[0].code == 0


def test_once_is_now_or_not_at_all() -> None:
    assert isinstance(advance(looking(ONCE), Seen(now=NOW, job=WELL, paced=True), ONCE)[1], Strike)
    state, _ = advance(looking(ONCE), Seen(now=NOW, job=ILL), ONCE)
    state, note = advance(state, Seen(now=NOW + 60, job=ILL), ONCE)
    assert isinstance(note, Note)
    assert (note.outcome, state.phase, state.code) == (Survival.SKIPPED, Phase.OVER, 2)
    state, _ = advance(watching(ONCE), Seen(now=NOW, outcome=GOOD), ONCE)
    assert (state.phase, state.code) == (Phase.OVER, 0)


def test_an_interval_in_which_the_history_has_a_drill_is_over() -> None:
    first = next_interval(NOW, every_s=HOUR, seed=1)
    again = begin(OPTIONS, NOW, patience_s=60, done=first.number)
    assert again.interval.number == first.number + 1


WALK = st.lists(
    st.tuples(
        st.floats(0, 3000),
        st.sampled_from([None, WELL, ILL]),
        st.booleans(),
        st.sampled_from(["", "moved on"]),
        st.sampled_from([None, GOOD, GOOD, (Survival.FAILED, "so"), (Survival.UNKNOWN, "so")]),
        st.integers(0, 15),
    ),
    max_size=60,
)


@given(WALK)
def test_invariants(walk) -> None:
    options = replace(OPTIONS, count=None)
    state, now, struck, in_flight, bad = start(options), NOW, set[int](), False, False
    for wait_s, how, paced, answer, outcome, stop in walk:
        now += wait_s
        before = state
        seen = Seen(
            now=now,
            job=how,
            paced=paced,
            answer=answer if before.phase is Phase.STRIKING else None,
            outcome=outcome if before.phase is Phase.WATCHING else None,
            stopped="a file is there" if stop == 0 else "",
        )
        state, command = advance(state, seen, options)
        match command:
            case Strike():
                assert (how, paced, seen.stopped, before.phase) == (WELL, True, "", Phase.LOOKING)
                assert before.interval.due <= now < before.interval.ends
                assert state.interval.number not in struck
                assert not in_flight
                assert not bad
            case Watch():
                in_flight = True
                struck.add(state.interval.number)
            case Note(outcome=Survival.SKIPPED):
                assert not in_flight
            case Note():
                in_flight = False
                bad = command.outcome is not Survival.SURVIVED
                assert (state.phase is Phase.OVER) == bad
            case End():
                assert state.phase is Phase.OVER
        if state.phase is Phase.WAITING and before.phase is not Phase.WAITING:
            assert state.interval.number > before.interval.number
