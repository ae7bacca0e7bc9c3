"""Disk: the coordinator's look at what a job can go on from when memory holds nothing."""

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ftkit.core.errors import FtkitError, RootInUse, StoreError, UsageError
from ftkit.core.ids import JobId, Step
from ftkit.launch.config import JobConfig

logger = logging.getLogger(__name__)

#: Between two tries of a store that fails. To begin anew instead would lose all the work in it.
AGAIN_S = 5.0


class Tell(Protocol):
    """Where events go: `core.trace.Trace.event`."""

    def __call__(self, kind: str, /, **fields: object) -> None: ...


class Disk:
    """One look at the checkpoints of a job, on a thread of its own; of the coordinator's thread.

    The newest is read whole before it counts, so that no world is formed around a checkpoint
    that its ranks could not load.
    """

    def __init__(
        self,
        config: JobConfig,
        tell: Tell,
        *,
        changed: Callable[[], None],
    ) -> None:
        """Prepare to look.

        Args:
          config: the job; without a `checkpoint_dir` there is nothing to look at.
          tell: told of damaged checkpoints and of a store that fails.
          changed: called, on the looking thread, when the answer is there.
        """
        self._config = config
        self._tell = tell
        self._changed = changed
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._answer: tuple[frozenset[Step]] | None = None
        self.refused = ""
        """Why the job must not begin at all; empty while it may."""

    def forget(self) -> None:
        """The answer is used up: the next `steps` looks anew."""
        if self._answer is not None:
            self._thread = self._answer = None

    def steps(self) -> frozenset[Step] | None:
        """The step to go on from, if there is one; None while that is being found out."""
        if not self._config.checkpoint_dir:
            return frozenset()
        if self._thread is None:
            self._thread = threading.Thread(target=self._look, name="ftkit-disk", daemon=True)
            self._thread.start()
        return None if self._answer is None else self._answer[0]

    def close(self) -> None:
        """Look no further. Does not wait for a store that hangs."""
        self._stop.set()

    def _look(self) -> None:
        """(looking thread) Find the newest good checkpoint, however long the store takes."""
        # Imported here: a job without checkpoints needs no pyarrow in its coordinator.
        from ftkit.checkpoint.persist.source import newest_good
        from ftkit.checkpoint.persist.store import open_store

        while not self._stop.is_set():
            try:
                store = open_store(self._config.checkpoint_dir)
                found = newest_good(store, ignore=self._config.checkpoint_ignore)
            except StoreError as error:
                self._tell("checkpoint-unread", reason=str(error))
                logger.warning("the job cannot begin: %s; trying again", error)
                self._stop.wait(AGAIN_S)
                continue
            except FtkitError as error:
                self.refused = str(error)
                break
            except Exception as error:  # a driver of the store's, say; nobody else would hear of it
                logger.exception("the look at %s broke off", self._config.checkpoint_dir)
                self.refused = (
                    f"looking for checkpoints in {self._config.checkpoint_dir} broke off with "
                    f"{error!r}: see the log"
                )
                break
            for step, why in found.damaged.items():
                self._tell("checkpoint-skipped", step=step, reason=f"it is damaged: {why}")
                logger.warning("checkpoint of step %s is damaged and passed over: %s", step, why)
            if found.step is None and found.damaged:
                self.refused = (
                    f"every checkpoint in {self._config.checkpoint_dir} is damaged: "
                    f"{'; '.join(found.damaged.values())}. Begin anew with --fresh, or give "
                    "another --checkpoint-dir"
                )
                break
            self._answer = (frozenset() if found.step is None else frozenset({found.step}),)
            break
        self._changed()


def refuse_or_take(config: JobConfig) -> JobConfig:
    """Make sure of a job's checkpoint directory before anything starts.

    Takes its lease, which the agents, being of the same job, take over.

    Returns:
      The job; with `checkpoint_fresh`, told which checkpoints to pass over.

    Raises:
      RootInUse: another job writes there.
      UsageError: it cannot be used.
    """
    if not config.checkpoint_dir:
        return config
    from ftkit.checkpoint.persist.lease import Lease
    from ftkit.checkpoint.persist.source import identities
    from ftkit.checkpoint.persist.store import open_store

    if (file := _file_in(config.checkpoint_dir)) is not None:
        raise UsageError(
            f"--checkpoint-dir {config.checkpoint_dir}: {file} is a file; give a folder, which is made "
            "if there is none"
        )
    try:
        store = open_store(config.checkpoint_dir)
        lease = Lease.take(store, JobId(config.job))
        try:
            old = identities(store) if config.checkpoint_fresh else ()
        except BaseException:
            lease.release()
            raise
    except RootInUse:
        raise
    except (FtkitError, OSError) as error:
        raise UsageError(f"--checkpoint-dir {config.checkpoint_dir}: {error}") from error
    return replace(config, checkpoint_ignore=old)


def _file_in(place: str) -> Path | None:
    """What stands where `place`, or a folder on the way to it, would be, and is none."""
    local = place.removeprefix("file://")
    if "://" in local:
        return None
    here = Path(local)
    return next((p for p in (here, *here.parents) if p.exists() and not p.is_dir()), None)


def give_back(config: JobConfig) -> None:
    """Let the next job have the checkpoint directory, whichever node held its lease last."""
    if not config.checkpoint_dir:
        return
    from ftkit.checkpoint.persist.lease import Lease
    from ftkit.checkpoint.persist.store import open_store

    try:
        Lease.take(open_store(config.checkpoint_dir), JobId(config.job)).release()
    except (FtkitError, OSError) as error:
        logger.debug("the lease of %s runs out by itself: %s", config.checkpoint_dir, error)
