"""RecordedGroup: torch's own gloo group, with begin and end of every collective told.

For scripts that know nothing of ftkit. `install` has torch make these in place of plain gloo
groups: for `init_process_group("gloo")`, `new_group`, device meshes, DDP and FSDP2 alike. The
collectives are gloo's; what is added is one call before each and one when it is done, on gloo's
thread. `torch.distributed.get_backend` goes on to say gloo.

What torch does not offer for this on gloo: completion hooks and timings exist for NCCL alone, and
its flight recorder knows no end of an operation (as of 2.13).
"""

import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from ftkit.collectives.ports import OpRecorder

#: Method of a process group -> what it is called in records. Each as torch looks it up.
_NAMES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce_coalesced",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_single_coalesced": "all_gather_coalesced",
    "allgather_coalesced": "all_gather_coalesced",
    "allgather_into_tensor_coalesced": "all_gather_coalesced",
    "gather": "gather",
    "scatter": "scatter",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_single_coalesced": "reduce_scatter_coalesced",
    "reduce_scatter_tensor_coalesced": "reduce_scatter_coalesced",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "barrier": "barrier",
}

#: Of (output, input) it is the input that this rank brings.
_INPUT_SECOND = frozenset(
    name
    for name, called in _NAMES.items()
    if called.startswith(("all_gather", "reduce_scatter", "gather", "scatter", "all_to_all"))
)


class RecordedGroup(dist.ProcessGroup):
    """One group. `recorder` is told of its collectives; sends and receives are passed through."""

    def __init__(
        self, gloo: Any, inner: dist.ProcessGroup, rank: int, size: int, recorder: OpRecorder
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.options = gloo.options
        self._gloo, self._inner = gloo, inner
        self._enter, self._leave = recorder.enter, recorder.leave
        # Numbers are those of issue: a group that threads use at once is out of order anyway.
        self._next = count().__next__
        self._number: int | None = None
        for device in (torch.device("cpu"), torch.device("cuda")):
            self._register_backend(device, dist.ProcessGroup.BackendType.GLOO, gloo)
        self._set_default_backend(dist.ProcessGroup.BackendType.GLOO)

    def getBackendName(self) -> str:  # noqa: N802 - torch's name
        return "gloo"

    def name(self) -> str:
        return "gloo"

    def _set_sequence_number_for_group(self) -> None:
        self._gloo._set_sequence_number_for_group()

    def number(self) -> int:
        """What the group is known by in records: 0 for the default group."""
        if self._number is None:
            default = c10d._world.default_pg
            name = self.group_name.encode()
            self._number = 0 if default is None or default is self else zlib.crc32(name) or 1
        return self._number


class _Watched(dist.Work):
    """A work without a future, which tells of its end when it is waited for."""

    def __init__(self, work: dist.Work, ended: Callable[[], None]) -> None:
        super().__init__()
        self._work = work
        self._ended: Callable[[], None] | None = ended

    def wait(self, timeout: timedelta | None = None) -> bool:
        try:
            return self._work.wait() if timeout is None else self._work.wait(timeout)
        finally:
            self._over()

    def is_completed(self) -> bool:
        done = self._work.is_completed()
        if done:
            self._over()
        return done

    def is_success(self) -> bool:
        return self._work.is_success()

    def exception(self) -> Any:
        return self._work.exception()

    def result(self) -> Any:
        return self._work.result()

    def source_rank(self) -> int:
        return self._work.source_rank()

    def synchronize(self) -> None:
        self._work.synchronize()

    def _over(self) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended()


def _method(name: str) -> Callable[..., Any]:
    """What stands in for torch's `name`. It is in the way of every collective: each line counts."""
    called, place = _NAMES[name], 1 if name in _INPUT_SECOND else 0
    reduces = "reduce" in called
    issue = getattr(dist.ProcessGroup, name)
    #: dtype -> number of the reduction, 0 for what has none -> what it is called in records
    names: dict[torch.dtype, dict[int, str]] = defaultdict(dict)

    def call(self: RecordedGroup, *args: Any, **more: Any) -> Any:
        op, nbytes, options = called, 0, args[-1] if args else None
        if len(args) > place:
            tensor = args[place]
            if type(tensor) is list and len(tensor) == 1:
                tensor = tensor[0]
            if isinstance(tensor, torch.Tensor) or (tensor := _first(tensor)) is not None:
                reduction = getattr(options, "reduceOp", None) if reduces else None
                dtype = tensor.dtype
                known = names[dtype]
                # Its hash is its number; to compare two of torch's takes longer than all the rest.
                number = 0 if reduction is None else 1 + hash(reduction)
                op = known.get(number) or known.setdefault(
                    number, _signature(called, dtype, reduction)
                )
                nbytes = tensor.nbytes
        group, seq = self._number, self._next()
        if group is None:
            group = self.number()
        self._enter(group, seq, op, nbytes)
        try:
            work = issue(self._inner, *args, **more)
            if not getattr(options, "asyncOp", True):
                # Who calls waits at once: so do we, and spare gloo's thread the interpreter.
                work.wait()
                self._leave(group, seq, True)
                return work
        except BaseException:
            self._leave(group, seq, False)
            raise
        leave = self._leave
        try:
            work.get_future().add_done_callback(lambda future: leave(group, seq, True))
        except RuntimeError:
            # gloo's reduce_scatter, for one, has no future.
            return _Watched(work, lambda: leave(group, seq, True))
        return work

    call.__name__ = name
    return call


def _passed_on(name: str) -> Callable[..., Any]:
    def call(self: RecordedGroup, *args: Any, **more: Any) -> Any:
        return getattr(self._inner, name)(*args, **more)

    call.__name__ = name
    return call


for _name in _NAMES:
    if hasattr(dist.ProcessGroup, _name):
        setattr(RecordedGroup, _name, _method(_name))
for _name in ("send", "recv", "recv_anysource", "monitored_barrier"):
    if hasattr(dist.ProcessGroup, _name):
        setattr(RecordedGroup, _name, _passed_on(_name))


def _signature(called: str, dtype: torch.dtype, reduction: Any) -> str:
    """What the recorder calls it: all that ranks must agree on but the size."""
    kind = str(dtype).removeprefix("torch.")
    if reduction is None:
        return f"{called} {kind}"
    return f"{called} {str(reduction.op).rpartition('.')[2].lower()} {kind}"


def _first(value: Any) -> torch.Tensor | None:
    while isinstance(value, list | tuple):
        if not value:
            return None
        value = value[0]
    return value if isinstance(value, torch.Tensor) else None


class _Wanted(threading.local):
    """Whether the group that this thread is making is to be a recorded one."""

    now = False


def install(recorder: Callable[[], OpRecorder | None]) -> bool:
    """From now on have torch make recorded groups of those that are gloo alone.

    Args:
      recorder: asked for at each group; None leaves that one as it is.

    Returns:
      Whether this version of torch lets us. Nothing is changed otherwise.
    """
    helper: Any = getattr(c10d, "_new_process_group_helper", None)
    gloo: Any = getattr(c10d, "ProcessGroupGloo", None)
    if helper is None or gloo is None or getattr(helper, "recorded", False):
        return helper is not None and gloo is not None
    wanted = _Wanted()

    class Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, gloo | RecordedGroup)

        def __getattr__(cls, name: str) -> Any:
            return getattr(gloo, name)

        def __call__(cls, *args: Any, **more: Any) -> Any:
            made = gloo(*args, **more)
            told = recorder() if wanted.now else None
            if told is None:
                return made
            store, rank, size = args[:3]
            inner = dist.ProcessGroup(store, rank, size)
            inner._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
            for device in (torch.device("cpu"), torch.device("cuda")):
                inner._register_backend(device, dist.ProcessGroup.BackendType.GLOO, made)
            return RecordedGroup(made, inner, rank, size, told)

    class ProcessGroupGloo(metaclass=Meta):
        """torch's, or one that records: as the group that is being made asks for."""

    def make(
        group_size: int, group_rank: int, ranks: Any, backend: Any, *args: Any, **more: Any
    ) -> Any:
        try:
            map_ = c10d.BackendConfig(c10d.Backend(str(backend))).get_device_backend_map()
            only_gloo = set(map(str, map_.values())) == {"gloo"}
        except (ValueError, RuntimeError):
            only_gloo = False  # torch itself says what is wrong with it
        with _set(wanted, now=only_gloo):
            return helper(group_size, group_rank, ranks, backend, *args, **more)

    make.recorded = True  # type: ignore[attr-defined]
    c10d._new_process_group_helper = make  # type: ignore[assignment]
    c10d.ProcessGroupGloo = ProcessGroupGloo  # type: ignore[misc, assignment]
    return True


@contextmanager
def _set(wanted: _Wanted, *, now: bool) -> Iterator[None]:
    wanted.now = now
    try:
        yield
    finally:
        wanted.now = False
