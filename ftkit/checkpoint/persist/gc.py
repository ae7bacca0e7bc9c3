"""gc: remove what retention does not keep, and what dead writers left.

The newest checkpoint is read whole first: while it has not been proved good, nothing older
goes. A checkpoint loses its commit record before anything else, so that one half removed is
none at all, and the next call removes the rest.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ftkit.checkpoint.persist.checkpoint import Checkpoint, load, steps
from ftkit.checkpoint.persist.folder import COMMIT, PART, step_folder
from ftkit.checkpoint.persist.lease import Lease
from ftkit.checkpoint.persist.retention import Kept, Policy, to_keep
from ftkit.checkpoint.persist.store import Store
from ftkit.core.errors import IntegrityError
from ftkit.core.ids import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What `gc` did."""

    kept: tuple[Step, ...]
    removed: tuple[Step, ...]
    """Good checkpoints that no policy wanted, and damaged ones older than the newest good."""
    partial: tuple[Step, ...]
    """Steps that were never committed; removed."""
    damaged: Mapping[Step, str] = field(default_factory=dict)
    """What is wrong with each damaged one, removed or not."""


def gc(
    store: Store,
    policies: Sequence[Policy],
    lease: Lease,
    *,
    in_flight: Collection[Step] = (),
    verify: bool = True,
) -> Collected:
    """Remove checkpoints. Blocks: with `verify`, for a reading of the newest one.

    Args:
      store: the root.
      policies: what to keep; without any, every good checkpoint is kept.
      lease: this job's: others must not be writing.
      in_flight: steps that this job's writers are writing now.
      verify: read all bytes of the newest checkpoint before anything older goes. Only who has
        verified it since it was written may leave that out.

    Returns:
      What was kept and removed. Damaged checkpoints newer than the newest good one stay: what
      can be saved from them is not for `gc` to judge.

    Raises:
      UsageError: one has a format that this ftkit does not read; nothing was removed.
      RootInUse, StoreError: nothing more was removed.
    """
    lease.check()
    good, damaged, partial = dict[Step, Checkpoint](), dict[Step, str](), list[Step]()
    for step in steps(store):
        if step in in_flight:
            continue
        try:
            good[step] = load(store, step)
        except FileNotFoundError:
            partial.append(step)
        except IntegrityError as error:
            damaged[step] = str(error)
    while verify and good:
        newest = max(good)
        try:
            good[newest].verify(lambda _: lease.keep())
            break
        except IntegrityError as error:
            damaged[newest] = str(error)
            del good[newest]
    keep = to_keep((Kept(step=s, metrics=c.record.metrics) for s, c in good.items()), policies)
    removed = [step for step in good if step not in keep]
    if good and policies:
        removed += [step for step in damaged if step < max(good)]
    for step in sorted([*removed, *partial]):
        # The lease may have been lost while the newest was read, or others removed.
        lease.check()
        remove(store, step)
    for name in store.names():
        if name.startswith(PART):
            store.remove(name)
    return Collected(
        kept=tuple(sorted(keep)),
        removed=tuple(sorted(removed)),
        partial=tuple(partial),
        damaged=damaged,
    )


def remove(store: Store, step: Step) -> None:
    """Remove a step, committed or not: its commit record first."""
    folder = step_folder(step)
    store.remove(f"{folder}/{COMMIT}")
    store.remove_tree(folder)
