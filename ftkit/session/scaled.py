"""Scaled: micro-batches of as many samples as fit, each sample read and played as if it were alone."""

from collections.abc import Callable, Sequence
from typing import Any

from ftkit.core.errors import UsageError
from ftkit.core.ids import Slot, Step
from ftkit.recovery.data_cursor import derive, rng_key
from ftkit.session.draws import SampleDraws
from ftkit.session.feed import DatasetFeed, Feed
from ftkit.session.layers import seed_all


class Scaled:
    """The micro-batches of one step loop with `consistency="scaled"`. The training thread's."""

    def __init__(self, feed: Feed, *, most: int, seed: int, mean: bool) -> None:
        """Take note.

        Args:
          feed: of a data set, a sample in a slot.
          most: samples of a micro-batch, at most.
          seed: of the step loop.
          mean: whether losses are means over their micro-batch, rather than sums.

        Raises:
          UsageError: the feed's batches cannot be cut.
        """
        if not isinstance(feed, DatasetFeed):
            raise UsageError(
                'consistency="scaled" puts samples together anew, and the batches of a loader are '
                'made already: give the data set and slot_size=, or use consistency="bitwise"'
            )
        self._feed, self.most, self._seed, self.mean = feed, most, seed, mean
        self._draws = SampleDraws()

    def begin(
        self, step: Step, slots: Sequence[Slot], note: Callable[[Step, Slot, Any], None]
    ) -> Any:
        """The batch of these slots; until `end`, what is drawn is drawn by sample.

        `note` is told of each sample.
        """
        samples = []
        for slot in slots:
            seed_all(rng_key(self._seed, step, slot))
            read = self._feed.read(step, slot)
            note(step, slot, read)
            samples += read
        batch = self._feed.collate(samples)
        self._draws.begin(derive(self._seed, "draws", step) >> 1, slots)
        return batch

    def weight(self, slots: Sequence[Slot]) -> int:
        """What the gradients of a micro-batch count for in the sum over samples."""
        return len(slots) if self.mean else min(1, len(slots))

    def end(self) -> None:
        """The micro-batch has been played. Raises UsageError when it drew in another way."""
        self._draws.end()

    def stop(self) -> None:
        """Whatever ended the attempt: draw as ever again."""
        self._draws.stop()
