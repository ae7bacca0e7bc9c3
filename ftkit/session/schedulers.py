"""Schedulers: notice that one is stepped where its change misses the snapshot.

The snapshot of a step is taken as `with step:` ends. A scheduler stepped after that has its new
state in no snapshot of this step: a rank that is restored from it would be one behind the others.
"""

import warnings
from typing import Any

from ftkit.core.ids import Generation, Step
from ftkit.session.feed import digest_of


class Schedulers:
    """The protected schedulers, one or several. Used by the training thread."""

    def __init__(self, given: object | None) -> None:
        """Take note of them; what is no scheduler at all is refused elsewhere."""
        several = given if isinstance(given, (list, tuple)) else [given]
        self._schedulers: list[Any] = [s for s in several if hasattr(s, "state_dict")]
        self._at_commit: tuple[Generation, int] | None = None

    def committed(self, generation: Generation) -> None:
        """A step ended in `generation`; its snapshot holds the schedulers as they are now."""
        if self._schedulers:
            self._at_commit = generation, self._digest()

    def begin(self, step: Step, generation: Generation) -> None:
        """`step` begins. Warns, once, when a scheduler has changed since the one before."""
        if self._at_commit is None:
            return
        committed, digest = self._at_commit
        # A repair in between may have restored an older state: that is no change by the script.
        if committed == generation and self._digest() != digest:
            self._schedulers = []
            self._at_commit = None
            warnings.warn(
                f"a protected scheduler changed between step {step - 1} and step {step}: it is "
                f"stepped outside `with step:`, too late for the snapshot of step {step - 1}, and "
                "would be one behind in a rank that is restored from it. Step it inside, after "
                "the optimizer",
                stacklevel=3,
            )

    def _digest(self) -> int:
        return digest_of([s.state_dict() for s in self._schedulers])
