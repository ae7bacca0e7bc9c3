"""Status rows as a viewer reads them: of boards that are there, and without touching them."""

from pathlib import Path

import pytest

from ftkit.core.ids import MemberId
from ftkit.detection.status import StatusBoard, identity_offset
from ftkit.launch.ui.boards import read_rows


def test_rows_of_every_board_that_is_there_are_read(tmp_path: Path) -> None:
    (tmp_path / "torn").write_bytes(b"ftkboard")
    with (
        StatusBoard.create(tmp_path / "n0", seats=3) as first,
        StatusBoard.create(tmp_path / "n1", seats=1) as second,
    ):
        first.attach(0, MemberId(4))
        first.attach(2, MemberId(6))
        second.attach(0, MemberId(5))
        nodes = ("n0", "n1", "torn", "away")
        paths = {node: str(tmp_path / name) for node, name in enumerate(nodes)}
        before = (tmp_path / "n0").read_bytes()
        assert sorted(read_rows(paths)) == [4, 5, 6]
        assert (tmp_path / "n0").read_bytes() == before


def test_a_damaged_row_costs_only_itself(tmp_path: Path) -> None:
    with StatusBoard.create(tmp_path / "n0", seats=2) as board:
        board.attach(0, MemberId(1))
        board.attach(1, MemberId(2))
        with (tmp_path / "n0").open("r+b") as file:
            file.seek(identity_offset(0))
            file.write(b"\xff")
        assert sorted(read_rows({0: str(tmp_path / "n0")})) == [2]


def test_a_board_that_is_opened_to_read_cannot_be_written(tmp_path: Path) -> None:
    with StatusBoard.create(tmp_path / "n0", seats=1):
        board = StatusBoard.open(tmp_path / "n0", read_only=True)
        with pytest.raises(TypeError):
            board.attach(0, MemberId(1))
