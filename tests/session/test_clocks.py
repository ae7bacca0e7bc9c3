"""What the process says of itself: collections, and cores it was not given."""

import gc
import os
import time

from ftkit.session.core_clock import CoreClock
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


def test_waiting_for_a_core_is_what_the_kernel_says() -> None:
    clock = CoreClock()
    first = clock.starved_s()
    deadline = time.monotonic() + 5
    while clock.starved_s() == first and time.monotonic() < deadline:
        os.sched_yield()  # puts this thread behind others, if only for an instant
    assert clock.starved_s() >= first >= 0
    clock.close()
    clock.close()
    assert clock.starved_s() == 0.0
