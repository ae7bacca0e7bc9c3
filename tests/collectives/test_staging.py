"""Staging blocks: lent, receipted, recalled."""

from ftkit.collectives.resident import find
from ftkit.collectives.staging import READERS_MAX, Loan, Staging

BLOCK = 4096


def receipt(loan: Loan, reader: int, number: int | None = None) -> None:
    """What a reader does, through the place that it was told."""
    memory = loan.block.memory
    place = find(memory.ctypes.data, BLOCK)
    assert place is not None
    slot = find(loan.block.receipts.ctypes.data + 8 * reader, 8)
    assert slot is not None
    assert slot.offset == place.offset + loan.receipt_offset(reader)
    loan.block.receipts[reader] = loan.number if number is None else number


def test_a_block_comes_back_with_the_last_receipt() -> None:
    staging = Staging(BLOCK, 1)
    loan = staging.lend(2)
    assert loan is not None
    assert staging.lend(1) is None
    receipt(loan, 1)
    assert staging.lend(1) is None
    receipt(loan, 0)
    again = staging.lend(1)
    assert again is not None
    assert again.block.memory.ctypes.data == loan.block.memory.ctypes.data


def test_a_late_reader_of_an_earlier_loan_frees_nothing() -> None:
    staging = Staging(BLOCK, 1)
    old = staging.lend(1)
    assert old is not None
    staging.recall()
    new = staging.lend(1)
    assert new is not None
    receipt(new, 0, old.number)
    assert staging.lent
    receipt(new, 0)
    assert not staging.lent


def test_there_are_no_more_blocks_than_allowed_and_no_more_readers_than_receipts() -> None:
    staging = Staging(BLOCK, 11)
    loans = [staging.lend(1) for _ in range(12)]
    assert loans[11] is None
    assert len({loan.block.memory.ctypes.data for loan in loans[:11] if loan}) == 11
    staging.recall()
    assert staging.lend(READERS_MAX) is not None
    assert staging.lend(READERS_MAX + 1) is None
