"""Collections are counted from making the clock to closing it."""

import gc

from ftkit.session.gc_clock import GcClock


def test_collections_are_counted_until_close() -> None:
    before = len(gc.callbacks)
    clock = GcClock()
    gc.collect()
    counted = clock.seconds()
    assert counted > 0
    clock.close()
    clock.close()
    gc.collect()
    assert clock.seconds() == counted
    assert len(gc.callbacks) == before
