"""The status rows of a run's ranks, of those nodes whose shared memory is on this host."""

import logging
from collections.abc import Mapping
from pathlib import Path

from ftkit.core.errors import FtkitError
from ftkit.detection.row import Row
from ftkit.detection.status import StatusBoard

logger = logging.getLogger(__name__)


def read_rows(paths: Mapping[int, str]) -> dict[int, Row]:
    """Member -> its row. A board that is gone, on another host or damaged gives none.

    Boards are mapped for the look alone: a node that was replaced has another file, and the memory
    of a job that is over is given back. No rank waits for it.

    Args:
      paths: node -> where its board lies.
    """
    found: dict[int, Row] = {}
    for path in paths.values():
        try:
            with StatusBoard.open(Path(path), read_only=True) as board:
                for seat in range(board.seats):
                    row = _row(board, seat)
                    if row is not None:
                        found[row.member] = row
        except (OSError, FtkitError) as error:
            logger.debug("no rows from %s: %s", path, error)
    return found


def _row(board: StatusBoard, seat: int) -> Row | None:
    try:
        return board.read(seat)
    except FtkitError:
        return None  # this one is damaged; the others can be read all the same
