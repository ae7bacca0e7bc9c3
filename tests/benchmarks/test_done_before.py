"""Series of hours that go on where they were interrupted."""

from pathlib import Path

from benchmarks.done_before import DoneBefore


def test_what_was_done_is_there_the_next_time_and_only_for_the_same_options(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    first = DoneBefore(path, {"nproc": 4})
    assert first.records == []
    first.add({"seed": 1})
    DoneBefore(path, {"nproc": 3}).add({"seed": 2})
    again = DoneBefore(path, {"nproc": 4})
    assert again.records == [{"seed": 1}]


def test_a_record_that_was_cut_short_is_passed_over_and_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    DoneBefore(path, {}).add({"seed": 1})
    whole = path.read_bytes()
    for cut in range(len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        found = DoneBefore(path, {})
        assert found.records == [{"seed": 1}]
        found.add({"seed": 2})
        assert DoneBefore(path, {}).records == [{"seed": 1}, {"seed": 2}]


def test_without_a_file_nothing_is_kept() -> None:
    nothing = DoneBefore(None, {})
    nothing.add({"seed": 1})
    assert nothing.records == [{"seed": 1}]
