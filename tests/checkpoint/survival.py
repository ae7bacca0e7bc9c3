"""Survival told many times: losses, kills and rot by chance, each time every byte compared.

Each function strikes so many times, as a seed decides, and raises AssertionError when something
was lost, or bad and believed. The tests tell each story a few times, `benchmarks.survival` by
the hundred.
"""

import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftkit.checkpoint.arena import Arena
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.parity.buffer import ParityHead, read_head, shard_spots
from ftkit.checkpoint.parity.mend import fetch_head
from ftkit.checkpoint.parity.scrub import scrub
from ftkit.checkpoint.persist.checkpoint import open_checkpoint
from ftkit.checkpoint.persist.codecs import CodecPolicy
from ftkit.checkpoint.persist.gc import gc
from ftkit.checkpoint.persist.lease import Lease
from ftkit.checkpoint.persist.local_store import LocalStore
from ftkit.checkpoint.persist.retention import KeepLast
from ftkit.checkpoint.slabs import Sealed, paged
from ftkit.checkpoint.stripes import Code
from ftkit.core.errors import IntegrityError
from ftkit.core.ids import Generation, JobId, NodeId, Step
from tests.checkpoint.helpers import Training, assert_same, make_arena, pattern, write_pattern
from tests.checkpoint.parity.cluster import Cluster
from tests.checkpoint.persist.stories import (
    MIXED,
    ModelStore,
    assert_holds,
    assert_whole_or_none,
    flip,
    newest,
    save,
)

# Nodes that vanish.

#: Code, nodes and seats of each: groups of the code's own size, larger ones, and two at once.
CLUSTERS = [((2, 1), 3, 1), ((2, 2), 5, 2), ((3, 2), 10, 1), ((4, 3), 7, 1), ((1, 1), 4, 3)]


def lose_nodes(folder: Path, times: int, seed: int) -> int:
    """Nodes vanish together, up to m of each group, and come back; returns how many did."""
    rng, lost_nodes = random.Random(seed), 0
    for number, (code, nodes, seats) in enumerate(CLUSTERS):
        where = folder / f"cluster-{number}"
        where.mkdir()
        with Cluster(where, Code(*code), nodes, seats=seats) as cluster:
            for step in range(1, 1 + len(range(number, times, len(CLUSTERS)))):
                lost_nodes += _lose(cluster, step, rng)
    return lost_nodes


def _lose(cluster: Cluster, step: int, rng: random.Random) -> int:
    cluster.write(step)
    done = cluster.round()
    assert not done.broken, (step, done)
    stands = cluster.stands()
    assert stands is not None, (step, done)
    assert stands.round.step == step, (step, done, stands)
    if rng.random() < 0.5:
        # A newer step that has no parity yet: it is lost with them, and the older one is not.
        cluster.write(step + 1)
    lost = [n for g in stands.groups for n in rng.sample(g, rng.randint(0, cluster.code.m))]
    cluster.lose(*lost)
    for node in lost:
        cluster.start(node)
    for node in lost:
        cluster.mend(node, stands)
    for node in lost:
        head = fetch_head(cluster.peers(), stands, node)
        cluster.machines[node].holder.make_again(head.stripes)
    cluster.assert_state(step)
    assert cluster.stands() == stands, "the next m may go"
    return len(lost)


# A trainer that is killed.

PROGRESS = struct.Struct("<qq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kills:
    """What became of the saves of trainers that were killed."""

    kills: int
    torn: int
    """Kills that struck while a snapshot was being written."""
    newest_lost: int
    """Kills after which the newest save that was begun was not there."""


def kill_trainers(path: Path, times: int, seed: int) -> Kills:
    """SIGKILL at any moment of training with a snapshot of every step, each time from where the
    last was killed; what is recovered is compared with training that was never disturbed.
    """
    rng, reference, done = random.Random(seed), Training(seed=1), 0
    torn = newest_lost = 0
    reference.train(1)
    make_arena(path, reference.state.layout()).close()
    reference = Training(seed=1)
    for _ in range(times):
        sealed, begun = killed_somewhere(lambda told: train(path, told), rng)
        with Arena.open(path) as arena:
            torn += None in arena.slabs() and done > 2
            newest = arena.newest_good()
            assert newest is not None
            assert newest == arena.newest(), "what is sealed is whole"
            assert newest.step >= sealed, f"step {sealed} was sealed, {newest.step} is recovered"
            newest_lost += newest.step < begun
            for step in range(done + 1, newest.step + 1):
                reference.train(step)
            done = newest.step
            head = arena.head(newest)
            other = Training(seed=2)
            other.state.load(head.layout, arena.blocks(head), head.small)
        assert_same(other.state, reference.state)
    return Kills(kills=times, torn=torn, newest_lost=newest_lost)


def train(path: Path, told: mmap.mmap) -> None:
    """Train from the newest snapshot, for ever; tell the step sealed last, and begun last."""
    training = Training(seed=1)
    arena = Arena.open(path, writable=True)
    capture = Capture(arena, training.state)
    newest, step = arena.newest_good(), 0
    if newest is not None:
        head = arena.head(newest)
        training.state.load(head.layout, arena.blocks(head), head.small)
        step = newest.step
    PROGRESS.pack_into(told, 0, step, step)
    while True:
        step += 1
        training.forward_backward(step)
        capture.gate()
        PROGRESS.pack_into(told, 0, step - 1, step - 1)
        training.update()
        capture.begin(Step(step), Generation(1))
        PROGRESS.pack_into(told, 0, step - 1, step)


def killed_somewhere(story: Callable[[mmap.mmap], None], rng: random.Random) -> tuple[int, int]:
    """Run a story in a child, kill it some steps on; what it told of sealed and begun steps."""
    with mmap.mmap(-1, mmap.PAGESIZE) as told:
        PROGRESS.pack_into(told, 0, -1, -1)
        pid = os.fork()
        if pid == 0:
            try:
                story(told)
            finally:
                os._exit(1)
        try:
            first, deadline = -1, time.monotonic() + 60
            while first < 0 or PROGRESS.unpack_from(told)[1] < first + 3:
                assert time.monotonic() < deadline, "the trainer does not train"
                if first < 0:
                    first = PROGRESS.unpack_from(told)[1]
                time.sleep(0.001)  # much shorter than what is waited for
            time.sleep(rng.uniform(0, 0.02))  # the moment is what is drawn
        finally:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the trainer failed by itself"
        sealed, begun = PROGRESS.unpack_from(told)
    return sealed, begun


# Bits that flip.

_LAYOUT = StateLayout.of(
    [("a", "float32", (100, 7)), ("b", "uint8", (3,)), ("c", "float64", (500,))], small_bytes=200
)


def flip_in_arena(path: Path, times: int, seed: int) -> int:
    """One bit of what an arena uses; returns how often that was noticed, which is to be always.

    Every snapshot that reads as good after the flip is exactly what was written.
    """
    with make_arena(path, _LAYOUT) as arena:
        for step in (1, 2, 3):
            write_pattern(arena, _LAYOUT, step)
        geometry = arena.geometry
    used = [
        *range(48),
        *range(4088, 4096),
        *(
            geometry.slab_at(slab) + at
            for slab in range(3)
            for start, count in (
                (0, 100),
                (4088, 8 + len(_LAYOUT.encoded) + 10),
                (geometry.table_at, 48),
                (geometry.data_at, _LAYOUT.total_bytes),
            )
            for at in range(start, start + count)
        ),
    ]
    rng, noticed = random.Random(seed), 0
    for place in rng.sample(used, times):
        bit = rng.randrange(8)
        flip_file(path, place, bit)
        try:
            with Arena.open(path) as arena:
                whole = arena.newest_good()
                assert whole is not None
                good = [s for s in arena.snapshots() if is_good(arena, s)]
                noticed += len(good) < 3
                for item in good:
                    head = arena.head(item)
                    data = b"".join(bytes(block) for block in arena.blocks(head))
                    assert data == pattern(item.step, _LAYOUT.total_bytes)[: _LAYOUT.total_bytes]
                    assert head.small == {"step": item.step}
        except IntegrityError:
            noticed += 1
            assert place < 4096, "only damage to the first page costs more than one snapshot"
        flip_file(path, place, bit)
    return noticed


def flip_in_parity(folder: Path, times: int, seed: int) -> int:
    """One bit of a node's parity, and another node lost: made up for, from m = 2.

    Returns how often the bit was noticed by who read that parity, which is to be always.
    """
    rng, noticed = random.Random(seed), 0
    with Cluster(folder, Code(2, 2), 4) as cluster:
        cluster.write(1)
        assert not cluster.round().broken
        stands = cluster.stands()
        assert stands is not None
        for _ in range(times):
            bad, lost = rng.sample(sorted(cluster.machines), 2)
            holder = cluster.machines[bad].holder
            kept, path = holder.stripes_of(stands.round), holder.path_of(stands.round)
            places = used_of_parity(path, bad)
            # Head and data alike, though there is much more data.
            place, bit = rng.choice(rng.choice(places)), rng.randrange(8)
            flip_file(path, place, bit)
            try:
                noticed += bool(scrub(holder, kept))
            except IntegrityError:
                noticed += 1
            cluster.lose(lost)
            cluster.start(lost)
            cluster.mend(lost, stands)
            cluster.assert_state(1)
            flip_file(path, place, bit)
            head = fetch_head(cluster.peers(), stands, lost)
            cluster.machines[lost].holder.make_again(head.stripes)
    return noticed


def used_of_parity(path: Path, node: NodeId) -> list[range]:
    """Where a sealed buffer's page, meta, digests and shards lie in its file."""
    raw = read_head(path)
    head = ParityHead.parse(raw, node)
    table = 8 * len(head.digests)
    meta = len(raw) - 4096 - table
    table_at = 4096 + paged(meta)
    data_at = table_at + paged(table)
    found = [range(4096), range(4096, 4096 + meta), range(table_at, table_at + table)]
    for place, (at, _) in shard_spots(head.stripes, node).items():
        length = head.stripes.plan.stripes[place.stripe].length
        found.append(range(data_at + at, data_at + at + length))
    return found


def flip_on_disk(times: int, seed: int) -> int:
    """One bit of any file of a checkpoint, manifest and record among them.

    Returns how often it was noticed, which is to be always: what is given is what was saved,
    or an error that names the file.
    """
    clean = ModelStore()
    save(clean, 1)
    save(clean, 2, codec=CodecPolicy(small_bytes=0))
    rng, noticed = random.Random(seed), 0
    # Every file, and of the larger ones more.
    names = [n for n in clean.files if n.startswith("step-2/")]
    places = [(n, rng.randrange(8 * len(clean.files[n]))) for n in names][:times]
    weights = [len(clean.files[n]) for n in names]
    while len(places) < times:
        (name,) = rng.choices(names, weights)
        places.append((name, rng.randrange(8 * len(clean.files[name]))))
    for name, bit in places:
        store = ModelStore()
        store.files = clean.files | {name: flip(clean.files[name], bit)}
        opened = open_checkpoint(store)
        if opened.step == 1:
            noticed += 2 in opened.skipped
            assert_holds(opened)
            continue
        try:
            opened.verify()
        except IntegrityError as error:
            assert name in str(error), (name, bit, error)  # noqa: PT017
            noticed += 1
        try:
            assert_holds(opened)  # either what was saved ...
        except IntegrityError as error:  # ... or an error that names the file
            assert name in str(error), (name, bit, error)  # noqa: PT017
        collect(store)
        assert newest(store).step == 1, "what is damaged is not what others are removed for"
    return noticed


def flip_file(path: Path, place: int, bit: int) -> None:
    """Turn over one bit of a file; once more, and it is as it was."""
    with path.open("r+b") as file:
        file.seek(place)
        (byte,) = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def is_good(arena: Arena, sealed: Sealed) -> bool:
    """Whether every byte of a snapshot is what was captured."""
    try:
        arena.verify(sealed)
    except IntegrityError:
        return False
    return True


# A writer that is killed.

CALLS = ("open", "writev", "fsync", "link", "replace", "unlink", "rmdir", "mkdir")

#: Enough for every kind of file.
FEW = [MIXED[0], MIXED[3]]


def collect(store: Any, count: int = 1) -> None:
    """Remove all but the newest checkpoints."""
    with Lease.take(store, JobId("story")) as lease:
        gc(store, [KeepLast(count)], lease)


def kill_writers(folder: Path, times: int, seed: int) -> list[Step]:
    """A real process, real files: SIGKILL at any of its system calls, half-written files too.

    Save 2 and drop 1, dying on the way; then look, go on, and look again. Returns the newest
    good step after each kill.
    """

    def story(root: Path) -> None:
        store = LocalStore(root)
        save(store, 2, tensors=FEW)
        collect(store)

    def killed(root: Path, point: int) -> Callable[[], None]:
        def run() -> None:
            def action(_: str, count: int) -> None:
                if count == point:
                    os.kill(os.getpid(), signal.SIGKILL)

            strike_calls(action)
            story(root)

        return run

    save(LocalStore(folder / "count"), 1, tensors=FEW)
    calls = _calls_of(lambda: story(folder / "count"))
    rng = random.Random(seed)
    found = list[Step]()
    for number in range(times):
        root = folder / str(number)
        save(LocalStore(root), 1, tensors=FEW)
        status = in_child(killed(root, rng.randrange(1, calls + 1)))
        # fsyncs run in threads, so a point near the end may not be reached every time.
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL
        store = LocalStore(root)
        assert_whole_or_none(store)
        left = newest(store, FEW)
        found.append(left.step)
        assert left.skipped == {}
        if left.step == 1:
            save(store, 2, tensors=FEW)
        collect(store)
        assert newest(store, FEW).step == 2
        assert [n for n in store.names() if n.startswith("step")] == ["step-2"]
    return found


def _calls_of(story: Callable[[], None]) -> int:
    """How many calls that change a disk a story makes."""
    reading, writing = os.pipe()

    def run() -> None:
        calls = 0

        def action(_: str, count: int) -> None:
            nonlocal calls
            calls = count

        strike_calls(action)
        story()
        os.write(writing, str(calls).encode())

    assert in_child(run) == 0
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return int(pipe.read())


def strike_calls(action: Callable[[str, int], None]) -> None:
    """Wrap every call of the operating system that changes a disk. For forked children only.

    `action` is called before each with its name and number; a writev is torn in two, so that
    there is a moment at which half of it is written.
    """
    count = 0

    def wrap(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            action(name, count)
            if name == "writev" and sum(map(len, args[1])) > 1:
                half = b"".join(args[1])
                return real(args[0], [half[: len(half) // 2]])
            return real(*args, **kwargs)

        setattr(os, name, call)

    for name in CALLS:
        wrap(name)


def in_child(story: Callable[[], None]) -> int:
    """Run a story in a child of this process; returns how it ended, as `os.waitpid` says it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            story()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]
