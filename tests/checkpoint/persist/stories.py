"""Small checkpoints, and stores that die, tear and forget as real ones do."""

import random
from collections.abc import Callable, Sequence
from math import prod
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ftkit.checkpoint.layout import ITEM_BYTES
from ftkit.checkpoint.persist.boxes import Box, Shape
from ftkit.checkpoint.persist.checkpoint import Checkpoint, load, open_checkpoint, steps
from ftkit.checkpoint.persist.codecs import CodecPolicy
from ftkit.checkpoint.persist.commit import CommitRecord, begin, commit
from ftkit.checkpoint.persist.lease import LEASE, Lease
from ftkit.checkpoint.persist.plan import CheckpointPlan, Piece
from ftkit.checkpoint.persist.store import Buffer, Store, confined
from ftkit.checkpoint.persist.write import write
from ftkit.core.errors import StoreError
from ftkit.core.ids import JobId, Step

CHUNK = 256

#: Name, dtype, shape, and the boxes it is held in.
Tensors = Sequence[tuple[str, str, Shape, Sequence[Box]]]


class Died(BaseException):
    """The process is gone. No handler of errors may catch it, as none runs after SIGKILL."""


def contents(name: str, dtype: str, shape: Shape, seed: int) -> NDArray[np.uint8]:
    """The reference: what a tensor holds, as bytes of shape (*shape, item)."""
    rng = random.Random(f"{name}/{seed}")
    data = np.frombuffer(rng.randbytes(prod(shape) * ITEM_BYTES[dtype]), dtype=np.uint8)
    if dtype == "bool":
        data = data % 2
    return data.reshape(*shape, ITEM_BYTES[dtype])


def pieces_of(tensors: Tensors, seed: int) -> list[Piece]:
    found = list[Piece]()
    for name, dtype, shape, boxes in tensors:
        data = contents(name, dtype, shape, seed)
        for box in boxes:
            cut = np.ascontiguousarray(data[box.within(Box.whole(shape))])
            found.append(Piece(name, dtype, shape, box.offsets, box.shape, cut.reshape(-1).data))
    return found


def rows(shape: Shape, *sizes: int) -> list[Box]:
    """Boxes that share out the first dimension."""
    found, at = list[Box](), 0
    for size in sizes:
        found.append(Box((at, *(0,) * (len(shape) - 1)), (size, *shape[1:])))
        at += size
    return found


#: A bit of everything: sharded files, an edge, a scalar, an empty one, an irregular one.
MIXED: Tensors = [
    ("model/weight", "float32", (23, 11), rows((23, 11), 8, 8, 7)),
    ("model/half", "bfloat16", (40, 60), [Box.whole((40, 60))]),
    ("model/uneven", "int64", (17, 3), rows((17, 3), 5, 2, 10)),
    ("optimizer/step", "float32", (), [Box.whole(())]),
    ("nothing", "float32", (0, 4), [Box.whole((0, 4))]),
]


def save(
    store: Store,
    step: int,
    *,
    tensors: Tensors = MIXED,
    writers: int = 1,
    codec: CodecPolicy | None = None,
    metrics: dict[str, float] | None = None,
) -> CommitRecord:
    """Write and commit one checkpoint whose contents are those of `contents(..., seed=step)`."""
    pieces = pieces_of(tensors, step)
    plan = CheckpointPlan.of(pieces, codec=codec, chunk_bytes=CHUNK)
    with Lease.take(store, JobId("story")) as lease:
        begin(store, Step(step), lease)
        fragments = [
            write(store, Step(step), plan, pieces[i::writers], small={str(i): {"step": step}})
            for i in range(writers)
        ]
        return commit(store, Step(step), plan, fragments, lease, metrics=metrics)


def assert_holds(
    checkpoint: Checkpoint,
    seed: int | None = None,
    tensors: Tensors = MIXED,
) -> None:
    """The checkpoint gives back every tensor, whole, as it was saved."""
    seed = checkpoint.step if seed is None else seed
    assert checkpoint.tensors.keys() == {name for name, *_ in tensors}
    for name, dtype, shape, _ in tensors:
        assert (
            read(checkpoint, name, Box.whole(shape)) == contents(name, dtype, shape, seed).tobytes()
        ), name
    assert checkpoint.small["0"] == {"step": seed}


def read(checkpoint: Checkpoint, name: str, box: Box) -> bytes:
    out = bytearray(box.size * ITEM_BYTES[checkpoint.tensors[name].dtype])
    checkpoint.read(name, box, memoryview(out))
    return bytes(out)


def newest(store: Store, tensors: Tensors = MIXED) -> Checkpoint:
    """The newest good checkpoint, read and found to hold what was saved."""
    found = open_checkpoint(store, verify=True)
    assert_holds(found, tensors=tensors)
    return found


def assert_whole_or_none(store: Store) -> None:
    """Every step either opens or was never committed: none is half there."""
    for step in steps(store):
        try:
            load(store, step)
        except FileNotFoundError:
            continue


class ModelStore:
    """A store in memory that keeps apart what is written and what would survive a power cut.

    `strike` is called before each change with its number and may raise `Died` or an error; a
    file being written then has been written in part.
    """

    url = "model"
    in_pieces = True

    def __init__(self, strike: Callable[[int], None] = lambda _: None) -> None:
        self.files: dict[str, bytes] = {}
        self.unsynced: set[str] = set()
        self.changes = 0
        self._strike = strike

    def after_power_cut(self, rng: random.Random) -> "ModelStore":
        """What a machine finds when it comes back: unsynced files are anything."""
        again = ModelStore()
        for path, data in self.files.items():
            if path in self.unsynced:
                match rng.randrange(4):
                    case 0:
                        continue
                    case 1:
                        data = data[: rng.randrange(len(data) + 1)]
                    case 2:
                        data = bytes(len(data))
            again.files[path] = data
        again.files.pop(LEASE, None)  # of a boot that is over
        return again

    def change(self) -> None:
        self.changes += 1
        self._strike(self.changes)

    def batch(self) -> "ModelBatch":
        return ModelBatch(self)

    def put(self, path: str, data: bytes, *, exclusive: bool = False) -> None:
        if exclusive and confined(path) in self.files:
            raise FileExistsError(path)
        self.change()
        self.files[path] = bytes(data)
        self.unsynced.discard(path)
        self.change()  # done, and nobody was told

    def get(self, path: str) -> bytes:
        if confined(path) not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]

    def read(self, path: str, at: int, into: Sequence[memoryview]) -> int:
        data = memoryview(self.get(path))[at:]
        total = 0
        for view in into:
            part = data[total : total + view.nbytes]
            view[: part.nbytes] = part
            total += part.nbytes
        return total

    def sizes(self, path: str) -> dict[str, int]:
        return {
            name.removeprefix(path + "/"): len(data)
            for name, data in self.files.items()
            if name.startswith(path + "/")
        }

    def names(self) -> list[str]:
        return sorted({name.split("/")[0] for name in self.files})

    def remove(self, path: str) -> None:
        self.change()
        self.files.pop(confined(path), None)

    def remove_tree(self, path: str) -> None:
        for name in sorted(self.files, reverse=True):  # what is most in the way: the record last
            if name.startswith(confined(path) + "/"):
                self.change()
                del self.files[name]


class ModelBatch:
    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self._made = list[str]()

    def create(self, path: str, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        if confined(path) in self._store.files:
            raise StoreError(f"{path} exists")
        data = b"".join(buffers)
        self._store.files[path] = data[: len(data) // 2]
        self._store.unsynced.add(path)
        self._store.change()
        self._store.files[path] = data
        self._made.append(path)

    def extend(self, buffers: Sequence[Buffer], *, more: bool = False) -> None:
        path = self._made[-1]
        data = self._store.files[path]
        self._store.change()
        self._store.files[path] = data + b"".join(buffers)

    def flush(self) -> None:
        self._store.change()
        self._store.unsynced -= set(self._made)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def flip(data: bytes, bit: int) -> bytes:
    """The same bytes with one bit turned over."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
