"""GradientReducer: the gradients of every slot, taken as backward makes them, summed canonically.

A hook on each parameter copies its gradient of the current slot into a flat buffer (a leaf)
and drops the original; slots of one rank are summed along the fixed tree (`SlotTree`), and
in the last slot every bucket goes into `reduce_slots` as soon as it is full, so that
communication overlaps with the rest of backward. Buckets depend on the parameters alone, so
a newcomer cuts them like everybody else; DDP's own buckets, rebuilt after its first step,
would not fit. Each leaf ends in one flag a parameter, 1.0 where the slot produced a
gradient: a parameter that no slot of any rank used gets `.grad = None`, as in plain torch.

Buckets on a GPU go over the host (`HostSide`): when one is full its copy begins, and its reduction
does when the next one's copy has begun, or the slot is over. So backward waits for a GPU that is a
bucket behind, but never for the last kernels that it has launched, and all ranks start in the same
order.

What this rank adds is weighed, not the sum with anybody else's: in that a NaN is everybody's. The norm is taken, not `isfinite`: NaN and infinity go through it, and on one core
it reads 28 GB/s where `isfinite().all()` reads 1.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator, KeysView, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import xxhash

from ftkit.collectives.host_side import HostSide
from ftkit.collectives.resident import Pool
from ftkit.collectives.running_sum import RunningSum
from ftkit.collectives.slot_tree import SlotNode, SlotTree
from ftkit.core.errors import StateChanged, UsageError

#: A bucket is closed once it has so many bytes of gradients: large enough that the rounds of a reduction are cheap
#: beside its bytes, small enough that the first bucket is on its way early in backward, and
#: that little is left to do at its end.
BUCKET_BYTES_MIN, BUCKET_BYTES_MAX = 4 << 20, 32 << 20
_BUCKETS = 8

#: Memory for buckets is taken from the system in slabs of at most this.
_SLAB_BYTES_MAX = 256 << 20


class Waitable(Protocol):
    """The part of a collective's handle that is used here."""

    def wait(self, timeout_s: float | None = None) -> object: ...

    def done(self) -> bool: ...


#: Starts the canonical reduction of one bucket: (nodes, out, scale) -> handle.
Reduce = Callable[[Sequence[SlotNode], torch.Tensor, float], Waitable]

#: Told of the gradients of one slot in one bucket, complete and not yet summed: (slot, bucket,
#: gradients). They may be changed.
LookAt = Callable[[int, int, torch.Tensor], None]


@dataclass(slots=True, eq=False)
class _Bucket:
    params: list[torch.Tensor]
    offsets: list[int]
    length: int
    """Elements of a leaf: gradients, then one flag a parameter."""
    tree: SlotTree | RunningSum
    memory: Pool
    """Peers of this host read leaves and sums where they are."""
    staged: bool
    """Whether it goes over the host."""
    host: HostSide | None = field(init=False, default=None)
    out: torch.Tensor = field(init=False)
    views: list[torch.Tensor] = field(init=False)
    leaf: torch.Tensor | None = None
    missing: int = 0
    handle: Waitable | None = None
    fired: list[bool] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)
    """Of what this rank adds, node by node; each a tensor of one element where it was made."""

    def weigh(self) -> None:
        """Take the norms of what is reduced: nodes are read, and not changed, until the next attempt."""
        end = self.length - len(self.params)
        self.norms = [norm_of(node.value[:end]) for node in self.tree.nodes]

    def new_buffer(self) -> torch.Tensor:
        """A flat buffer of `length` elements, zeroed."""
        first = self.params[0]
        if first.device.type == "cpu":
            return self.memory.tensor(self.length, first.dtype)
        return torch.zeros(self.length, dtype=first.dtype, device=first.device)

    def send(self) -> None:
        """Let what this rank adds be on its way to the host, if that is where it goes."""
        if self.host is not None:
            self.host.send(self.tree.nodes)

    def start(self, reduce: Reduce, scale: float) -> None:
        """Start the reduction of what was sent. Blocks until it is on the host."""
        if self.host is None:
            self.handle = reduce(self.tree.nodes, self.out, scale)
        else:
            self.handle = reduce(self.host.arrived(), self.host.out, scale)

    def finish(self) -> torch.Tensor:
        """Wait for the sum. Returns it where the host can read it; `out` has it, too."""
        assert self.handle is not None, "every bucket was launched"
        self.handle.wait()
        if self.host is None:
            return self.out
        self.host.back(self.out)
        return self.host.out

    @property
    def settled(self) -> bool:
        """Whether no reduction uses the buffers any more."""
        return self.handle is None or self.handle.done()

    def renew_out(self) -> None:
        """A fresh buffer for the sum, and views of it in the shapes of the parameters."""
        self.out = self.new_buffer()
        self.host = HostSide(self.out) if self.staged else None
        self.views = [
            self.out[start : start + p.numel()].view(p.shape)
            for p, start in zip(self.params, self.offsets, strict=True)
        ]


class GradientReducer:
    """Owns `.grad` of its parameters during a step. The training thread's, and its backward passes'."""

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        *,
        slots: int,
        reduce: Reduce,
        mean: bool = True,
        running: bool = False,
        bucket_bytes: int | None = None,
        staged: Callable[[torch.device], bool] = lambda device: device.type != "cpu",
    ) -> None:
        """Hook every parameter that requires a gradient.

        Args:
          params: in the order of the model, the same on all ranks.
          slots: slots of the global batch.
          mean: whether the sum is divided by `slots`.
          running: whether this rank's slots are summed as they come, whatever slots they are,
            rather than along the fixed tree.
          reduce: starts the canonical reduction of one bucket.
          bucket_bytes: gradients after which a bucket is closed; must be the same on all ranks.
            By default an eighth of all, within bounds.
          staged: whether buckets of a device go over the host.
        """
        self._slots = slots
        self._scale = 1.0 / slots if mean else 1.0
        self._reduce = reduce
        self._running = running
        trained = [p for p in params if p.requires_grad]
        self._buckets = _cut(trained, self._new_tree, bucket_bytes, staged)
        self._where = {id(p): (b, i) for b in self._buckets for i, p in enumerate(b.params)}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._take)  # type: ignore[no-untyped-call]
            for b in self._buckets
            for p in b.params
        ]
        self._slot: int | None = None
        self._weight = 1
        self._last = False
        self._sent = self._started = 0
        self._launching = threading.Lock()
        self._reduced = False
        self.look_at: LookAt | None = None
        """Told of each slot's gradients, bucket by bucket, on the thread of backward."""

    @property
    def norms(self) -> list[float]:
        """Of what this rank adds to each bucket in this step, once all are under way.

        Not finite where a gradient is not, or is beyond 1e19. Waits for a GPU that still
        computes.
        """
        return [math.hypot(*(t.item() for t in bucket.norms)) for bucket in self._buckets]

    @property
    def ids(self) -> KeysView[int]:
        """`id` of every parameter that is reduced."""
        return self._where.keys()

    @property
    def buckets(self) -> int:
        """How many reductions a step takes."""
        return len(self._buckets)

    @property
    def summed(self) -> tuple[list[int], list[int]]:
        """Slots of this attempt that are summed in every bucket, and those that are in some.

        Neither where a reduction still reads the sums: they cannot be added to.
        """
        if not all(bucket.settled for bucket in self._buckets):
            return [], []
        counts = [
            sum(slot in bucket.tree for bucket in self._buckets) for slot in range(self._slots)
        ]
        whole = [slot for slot, count in enumerate(counts) if count and count == self.buckets]
        return whole, [slot for slot, count in enumerate(counts) if 0 < count < self.buckets]

    def begin(self, *, keep: bool = False) -> None:
        """A new attempt: forget whatever an earlier one left, clean `.grad`.

        `keep`: go on with the sums of the attempt before, of the same step from the same state. A
        slot that is in some of them is played once more and added to the others.
        """
        self._slot, self._last, self._reduced = None, False, False
        self._sent = self._started = 0
        for bucket in self._buckets:
            if bucket.host is not None:
                bucket.host.arrived()  # what was sent and not started is read no more
            if bucket.settled and keep:
                if bucket.leaf is not None:
                    bucket.tree.take_back(bucket.leaf)
            elif bucket.settled:
                bucket.tree.clear()
            else:
                # The attempt was left without a fault of the job: its reduction still runs.
                bucket.tree = self._new_tree()
                bucket.renew_out()
            bucket.leaf, bucket.handle, bucket.norms = None, None, []
            for param in bucket.params:
                param.grad = None

    def start_slot(self, slot: int, *, last: bool, weight: int = 1) -> None:
        """Backward of `slot` comes next; `last` of those this rank holds.

        `weight`: what its gradients count for in the sum, where slots are played together.
        """
        self._slot, self._last, self._weight = slot, last, weight
        for bucket in self._buckets:
            spare = bucket.tree.spare()
            bucket.leaf = bucket.new_buffer() if spare is None else spare
            bucket.missing = len(bucket.params)
            bucket.fired = [False] * len(bucket.params)

    def end_slot(self) -> None:
        """Backward of the slot is over: complete what it left out."""
        for bucket in self._buckets:
            if bucket.leaf is not None:
                self._complete(bucket)
        self._slot = None
        if self._last:
            self._launch_all()

    def finish(self, *, held: int) -> int:
        """Wait for all sums and put them into `.grad`. Blocks.

        Args:
          held: slots this rank held in this step; with none it only takes part.

        Returns:
          A 64-bit digest of the reduced gradients, equal on all ranks.

        Raises:
          JobFault: a reduction was aborted.
          UsageError: the loop over the batches was left before its last slot.
        """
        if self._slot is not None:
            raise UsageError("the loop over step.batches() was left early")
        self._last = True
        self._launch_all()  # where nothing was left to play
        for bucket in self._buckets:
            bucket.weigh()  # while the last one is on its way
        digest = xxhash.xxh3_64()
        for bucket in self._buckets:
            total = bucket.finish()
            digest.update(total.view(torch.uint8).numpy().data)
            used = total[-len(bucket.params) :].tolist()
            for param, view, flag in zip(bucket.params, bucket.views, used, strict=True):
                param.grad = view if flag > 0 else None
        self._reduced = True
        return digest.intdigest()

    def end(self) -> None:
        """The step is over; what backward does until the next one is not ours."""
        self._reduced = False

    def parts_of(
        self, bucket: int, values: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each parameter of a bucket, and its part of the bucket's gradients."""
        one = self._buckets[bucket]
        for param, start in zip(one.params, one.offsets, strict=True):
            yield param, values[start : start + param.numel()]

    def drop_if_not_finite(self) -> bool:
        """Take `.grad` away from all parameters if the reduced gradients are not all finite.

        The answer is the same on all ranks. Reads the gradients once.
        """
        sums = (norm_of(b.out[: -len(b.params)]).item() for b in self._buckets)
        if all(math.isfinite(value) for value in sums):
            return False
        for bucket in self._buckets:
            for param in bucket.params:
                param.grad = None
        return True

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _take(self, param: torch.Tensor) -> None:
        """(autograd hook) Copy one gradient of the current slot into its leaf."""
        if self._slot is None:
            if self._reduced:
                raise UsageError(
                    "backward() after step.batches() has ended would make gradients that are "
                    "not reduced; optimizers whose closure runs backward are not supported"
                )
            return  # outside a step: the user's own business
        bucket, i = self._where[id(param)]
        grad = param.grad
        if bucket.leaf is None or bucket.fired[i]:
            raise UsageError(
                "a parameter received gradients twice in one slot: call backward() once a batch"
            )
        assert grad is not None, "the hook runs after accumulation"
        if grad.is_sparse:
            raise UsageError("sparse gradients are not supported; use sparse=False")
        start = bucket.offsets[i]
        bucket.leaf[start : start + param.numel()].view(param.shape).copy_(grad)
        param.grad = None
        bucket.fired[i] = True
        bucket.missing -= 1
        if not bucket.missing:
            self._complete(bucket)
            if self._last:
                self._launch()

    def _complete(self, bucket: _Bucket) -> None:
        leaf, bucket.leaf = bucket.leaf, None
        assert leaf is not None, "a leaf is completed once"
        assert self._slot is not None, "a leaf belongs to a slot"
        for i, fired in enumerate(bucket.fired):
            if not fired:
                start = bucket.offsets[i]
                leaf[start : start + bucket.params[i].numel()].zero_()
        flags = leaf[-len(bucket.params) :]
        if all(bucket.fired):
            flags.fill_(1.0)  # a GPU need not be waited for
        else:
            flags.copy_(torch.tensor(bucket.fired, dtype=leaf.dtype))
        if self.look_at is not None:
            gradients = leaf[: -len(bucket.params)]
            self.look_at(self._slot, self._buckets.index(bucket), gradients)
        if self._weight != 1:
            leaf[: -len(bucket.params)].mul_(self._weight)
        if self._slot in bucket.tree:  # an attempt before came so far
            bucket.tree.take_back(leaf)
        else:
            bucket.tree.push(self._slot, leaf)

    def _new_tree(self) -> SlotTree | RunningSum:
        return RunningSum() if self._running else SlotTree(self._slots)

    def _launch(self) -> None:
        """Start what is full, strictly in order, so that all ranks start alike.

        Where parameters are on several devices, autograd has a thread for each.
        """
        with self._launching:
            while self._sent < len(self._buckets):
                bucket = self._buckets[self._sent]
                if bucket.leaf is not None:
                    return
                bucket.send()
                self._sent += 1
                # The newest copy runs beside what backward launches next.
                self._start(self._sent - (bucket.host is not None))

    def _launch_all(self) -> None:
        self._launch()
        self._start(len(self._buckets))

    def _start(self, end: int) -> None:
        """Start the reductions of the buckets before `end` that are not under way."""
        while self._started < end:
            self._buckets[self._started].start(self._reduce, self._scale)
            self._started += 1


def norm_of(values: torch.Tensor) -> torch.Tensor:
    """The 2-norm, in float32 at least: a tensor of one element, which nobody has waited for."""
    dtype = torch.float32 if values.dtype in (torch.float16, torch.bfloat16) else None
    norm: torch.Tensor = torch.linalg.vector_norm(values.detach(), dtype=dtype)
    return norm


def _cut(
    params: list[torch.Tensor],
    tree: Callable[[], SlotTree | RunningSum],
    bucket_bytes: int | None,
    staged: Callable[[torch.device], bool],
) -> list[_Bucket]:
    """Buckets of parameters in reverse order, about the order in which backward fills them."""
    total = sum(p.numel() * p.element_size() for p in params)
    if bucket_bytes is None:
        bucket_bytes = min(max(total // _BUCKETS, BUCKET_BYTES_MIN), BUCKET_BYTES_MAX)
    groups: list[list[torch.Tensor]] = []
    size = 0
    for param in reversed(params):
        if not param.dtype.is_floating_point:
            raise StateChanged(f"cannot reduce gradients of dtype {param.dtype}")
        nbytes = param.numel() * param.element_size()
        last = groups[-1][-1] if groups else None
        alike = last is not None and (last.dtype, last.device) == (param.dtype, param.device)
        # Not "would be too large": a weight's bias would often be left to a bucket of its own.
        if not alike or size >= bucket_bytes:
            groups.append([])
            size = 0
        groups[-1].append(param)
        size += nbytes
    memory = Pool(min(total + 4096 * len(groups), _SLAB_BYTES_MAX))
    return [_bucket(group, tree(), memory, staged(group[0].device)) for group in groups]


def _bucket(
    params: list[torch.Tensor], tree: SlotTree | RunningSum, memory: Pool, staged: bool
) -> _Bucket:
    offsets, at = [], 0
    for param in params:
        offsets.append(at)
        at += param.numel()
    bucket = _Bucket(
        params=params,
        offsets=offsets,
        length=at + len(params),
        tree=tree,
        memory=memory,
        staged=staged,
    )
    bucket.renew_out()
    return bucket
