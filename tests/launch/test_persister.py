"""Two nodes write a snapshot whose tensors their parts cut; then everything goes wrong."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ftkit.checkpoint.arena import Arena, arena_path
from ftkit.checkpoint.chunks import Share
from ftkit.checkpoint.gate import Gate, OpenGate
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.persist.boxes import Box
from ftkit.checkpoint.persist.checkpoint import load, open_checkpoint, steps
from ftkit.checkpoint.persist.local_store import LocalBatch, LocalStore
from ftkit.checkpoint.persist.source import identities, newest_good, small_by_seat
from ftkit.checkpoint.persist.store import Store
from ftkit.checkpoint.provision import ensure_arena
from ftkit.checkpoint.serve import ArenaServer
from ftkit.checkpoint.slabs import Pin
from ftkit.core.governor import Grant
from ftkit.core.ids import Generation, JobId, NodeId, Seat, Step
from ftkit.core.trace import Trace, read_events
from ftkit.launch import persister
from ftkit.launch.checkpointing import Order, OrderEnd, Report, Stage, judge
from ftkit.launch.config import JobConfig
from ftkit.launch.faulty_store import FaultyStore, StoreFault, StoreFaultKind
from ftkit.launch.persister import Persister
from tests.checkpoint.helpers import pattern

SECRET = b"secret"
CHUNK = 1024
LAYOUT = StateLayout.of(
    [("model/a", "float32", (300,)), ("model/b", "float32", (40, 30)), ("model/n", "int64", ())]
)
WAIT_S = 30.0


@dataclass
class Nodes:
    """Two nodes with an arena each, and what a coordinator would do with them."""

    config: JobConfig
    persisters: dict[NodeId, Persister]
    arenas: dict[NodeId, Arena]
    servers: dict[NodeId, tuple[str, int]]
    folder: Path
    changed: threading.Condition
    attempts: int = 0
    on_order: Callable[[Order], None] = field(default=lambda _: None)

    def capture(
        self, step: int, *, generation: int = 1, pins: tuple[Pin, ...] = (Pin.DUE,)
    ) -> None:
        """Each node seals its half of a snapshot."""
        data = np.frombuffer(pattern(step, LAYOUT.total_bytes), dtype=np.uint8)
        for node, arena in self.arenas.items():
            writer = arena.start(
                Step(step), Generation(generation), LAYOUT, share=Share(node, 2), pins=pins
            )
            first = Share(node, 2).chunks(-(-LAYOUT.total_bytes // CHUNK)).start * CHUNK
            writer.data[:] = data[first : first + len(writer.data)]
            writer.digest(range(len(writer.table)))
            writer.seal(b'{"of":%d,"others":{}}' % node)

    def persist(self) -> OrderEnd | None:
        """Order what is due, and lead it to its end; None when nothing is."""
        order, outcome = None, None
        while outcome is None:
            reports = {n: p.report() for n, p in self.persisters.items()}
            after, outcome = judge(order, reports, last_attempt=self.attempts)
            if after is None and outcome is None:
                return None
            if after != order:
                order = after
                if order is not None:
                    self.attempts = order.attempt
                    self.on_order(order)
                for persister in self.persisters.values():
                    persister.take(order, self.servers)
            elif outcome is None:
                self.wait(partial(self._moved, reports))
        self.wait(lambda: not any(any(row[Pin.PERSIST] for row in self.pins(n)) for n in (0, 1)))
        return outcome

    def pins(self, node: int) -> list[tuple[bool, ...]]:
        arena = self.arenas[NodeId(node)]
        return [arena.pins(slab) for slab in range(arena.geometry.slabs)]

    def wait(self, done: Callable[[], bool]) -> None:
        with self.changed:
            for _ in range(int(WAIT_S / 0.01)):
                if done():
                    return
                self.changed.wait(0.01)
        raise AssertionError("it never happened")

    def events(self, kind: str) -> list[dict[str, object]]:
        return [
            e
            for path in self.folder.glob("events/*.jsonl")
            for e in read_events(path)
            if e["kind"] == kind
        ]

    def _moved(self, before: dict[NodeId, Report]) -> bool:
        return before != {n: p.report() for n, p in self.persisters.items()}


class Stalled(LocalStore):
    """A disk that answers nobody who writes files until it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked = threading.Event()
        self.answers = threading.Event()

    def batch(self) -> LocalBatch:
        self.asked.set()
        assert self.answers.wait(WAIT_S)
        return super().batch()


@contextlib.contextmanager
def nodes(
    folder: Path,
    *,
    fault: StoreFault | None = None,
    stores: Mapping[NodeId, Store] = {},  # never changed
    gate: Gate | None = None,
    **more: Any,
) -> Iterator[Nodes]:
    config = JobConfig(
        job="j", command=("x",), nodes=2, run_dir=str(folder), shm_root=str(folder),
        checkpoint_dir=str(folder / "disk"), checkpoint_every=1, **{"checkpoint_keep": "", **more},
    )  # fmt: skip
    changed = threading.Condition()

    def tell() -> None:
        with changed:
            changed.notify_all()

    with contextlib.ExitStack() as stack:
        arenas, servers, persisters = {}, {}, {}
        for node in map(NodeId, (0, 1)):
            shm = config.shm_dir(node)
            shm.mkdir(exist_ok=True)
            path = arena_path(JobId("j"), Seat(node), shm)
            arenas[node] = stack.enter_context(
                ensure_arena(path, LAYOUT, replicas=2, chunk_bytes=CHUNK, slabs=4)
            )
            server = stack.enter_context(ArenaServer(shm, JobId("j"), SECRET))
            servers[node] = server.address
            trace = stack.enter_context(Trace(folder / "events" / f"agent-{node}.jsonl"))
            disk = stores.get(node) or LocalStore(folder / "disk")
            faulty = fault is not None and fault.node == node
            store = FaultyStore(disk, fault, folder) if faulty and fault else disk
            persister = Persister(config, node, SECRET, trace, changed=tell, store=store, gate=gate)
            stack.callback(persister.close)
            persisters[node] = persister
        yield Nodes(config, persisters, arenas, servers, folder, changed)


def assert_whole(folder: Path, step: int) -> None:
    """The newest good checkpoint is that of `step`, and every tensor what was captured."""
    store = LocalStore(folder / "disk")
    assert newest_good(store).step == step
    found = open_checkpoint(store, Step(step), verify=True)
    data = pattern(step, LAYOUT.total_bytes)
    for entry in LAYOUT.entries:
        out = bytearray(entry.bytes)
        found.read(entry.name, Box.whole(entry.shape), memoryview(out))
        assert out == data[entry.at : entry.at + entry.bytes], entry.name
    assert small_by_seat(found) == {s: {"of": s, "others": {}} for s in (0, 1)}


def test_two_nodes_write_tensors_that_their_parts_cut(tmp_path: Path) -> None:
    with nodes(tmp_path) as two:
        two.capture(10)
        assert two.persist() == OrderEnd(step=Step(10), failed="")
        assert_whole(tmp_path, 10)
        (told,) = two.events("checkpoint")
        assert told["tensor_bytes"] == sum(e.bytes for e in LAYOUT.entries)
        assert two.persist() is None, "what is on disk is due no more"
    names = {p.name for p in (tmp_path / "disk").iterdir()}
    assert names == {"step-10", ".lease.lock", "lease.json"}, "fragments are gone"


def test_pieces_of_files_pass_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(OpenGate):
        """Lets everything through, and remembers."""

        def __init__(self) -> None:
            self.asked = list[tuple[int, float]]()
            self.given_up_bytes = 0

        def ask(self, nbytes: int, *, whole: bool = True, touches: float = 0.0) -> Grant:
            self.asked.append((nbytes, touches))
            return Grant(nbytes)

        def given_up(self, grant: Grant) -> None:
            self.given_up_bytes += grant.bytes

    monkeypatch.setattr(persister, "GATED_BYTES", 1000)
    gate = Counting()
    with nodes(tmp_path, gate=gate) as two:
        two.capture(1)
        assert two.persist() is not None
        assert_whole(tmp_path, 1)
    sizes = [n for n, _ in gate.asked]
    assert max(sizes) == 1000
    assert sum(sizes) >= sum(entry.bytes for entry in LAYOUT.entries)
    assert gate.given_up_bytes == sum(sizes)
    assert {t for _, t in gate.asked} == {3.0}


def test_how_much_is_written_is_told_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(persister, "TELL_S", -1.0)
    with nodes(tmp_path) as two:
        two.capture(10)
        two.persist()
        # Told before each tensor: when the last one of this node was begun, the first was done.
        assert two.persisters[NodeId(0)].report().written == LAYOUT.entries[0].bytes


def test_a_snapshot_that_is_due_is_kept_and_one_that_is_written_too(tmp_path: Path) -> None:
    with nodes(tmp_path) as two:
        two.capture(10)

        def train_on(order: Order) -> None:
            for step in range(11, 20):
                two.capture(step + 100 * order.stage, pins=())

        two.on_order = train_on
        assert two.persist() == OrderEnd(step=Step(10), failed="")
        assert_whole(tmp_path, 10)


def test_a_step_that_is_tried_again_waits_for_who_still_writes_the_last_try(tmp_path: Path) -> None:
    slow = Stalled(tmp_path / "disk")
    with nodes(tmp_path, stores={NodeId(1): slow}) as two:
        two.capture(10)
        reports = {n: p.report() for n, p in two.persisters.items()}
        first, _ = judge(None, reports, last_attempt=0)
        assert first is not None
        node0 = two.persisters[NodeId(0)]
        for stage in (Stage.BEGIN, Stage.CLEAR, Stage.WRITE):
            for persister in two.persisters.values():
                persister.take(replace(first, stage=stage), two.servers)
            two.wait(lambda stage=stage: node0.report().done >= stage)  # type: ignore[misc]
        assert slow.asked.wait(WAIT_S), "node 1 writes, or would"
        # Given up, for whatever reason, and the same step is due again.
        for arena in two.arenas.values():
            arena.pin(arena.find(Step(10)), Pin.DUE)
        two.attempts = first.attempt
        outcomes = list[OrderEnd | None]()
        again = threading.Thread(target=lambda: outcomes.append(two.persist()))
        again.start()
        two.wait(lambda: node0.report().attempt == 2 and node0.report().done >= Stage.BEGIN)
        slow.answers.set()
        again.join()
        assert outcomes == [OrderEnd(step=Step(10), failed="")]
        assert_whole(tmp_path, 10)


def test_a_full_disk_is_told_and_the_next_one_has_room_again(tmp_path: Path) -> None:
    fault = StoreFault(kind=StoreFaultKind.FULL, node=1, seat=1, byte=100)
    with nodes(tmp_path, fault=fault) as two:
        two.capture(10)
        outcome = two.persist()
        assert outcome is not None
        assert outcome.failed.startswith("node 1: ")
        assert "is full" in outcome.failed
        two.capture(20)
        again = two.persist()
        assert again is not None
        assert "is full" in again.failed
        assert newest_good(LocalStore(tmp_path / "disk")).step is None
    with nodes(tmp_path) as two:
        two.capture(30)
        assert two.persist() == OrderEnd(step=Step(30), failed="")
    assert steps(LocalStore(tmp_path / "disk")) == [30], "what did not fit was cleared away"
    assert_whole(tmp_path, 30)


def test_a_part_that_was_overwritten_while_it_was_written_is_not_committed(tmp_path: Path) -> None:
    with nodes(tmp_path) as two:
        two.capture(10)

        def overwrite(order: Order) -> None:
            if order.stage == 2:
                arena = two.arenas[NodeId(1)]
                arena.pin(arena.find(Step(10)), Pin.PERSIST, on=False)
                for step in range(11, 15):
                    two.capture(step, pins=())

        two.on_order = overwrite
        outcome = two.persist()
        assert outcome is not None
        assert "step 10" in outcome.failed
        assert newest_good(LocalStore(tmp_path / "disk")).step is None


def test_a_flipped_bit_in_memory_never_reaches_the_disk(tmp_path: Path) -> None:
    with nodes(tmp_path) as two:
        two.capture(10)
        arena = two.arenas[NodeId(1)]
        with arena.path.open("r+b") as file:
            at = arena.geometry.slab_at(0) + arena.geometry.data_at
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
        outcome = two.persist()
        assert outcome is not None
        assert "has digest" in outcome.failed


def test_a_step_that_comes_again_is_written_again_only_if_it_is_damaged(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "disk")
    with nodes(tmp_path) as two:
        two.capture(10)
        two.persist()
        first = identities(store)
        two.capture(10, generation=2)
        assert two.persist() == OrderEnd(step=Step(10), failed="")
        assert identities(store) == first
        name = next(n for n in store.sizes("step-10") if "/c" in n)
        (tmp_path / "disk" / "step-10" / name).write_bytes(b"")
        two.capture(10, generation=3)
        assert two.persist() == OrderEnd(step=Step(10), failed="")
        assert identities(store) != first
    assert_whole(tmp_path, 10)


def test_a_fresh_start_keeps_the_old_ones_until_there_is_a_new_one(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "disk")
    with nodes(tmp_path) as two:
        for step in (10, 20, 30):
            two.capture(step)
            two.persist()
    old = identities(store)
    assert newest_good(store, ignore=old).step is None
    fault = StoreFault(kind=StoreFaultKind.FULL, node=0, seat=0, byte=0)
    with nodes(tmp_path, checkpoint_ignore=old, fault=fault) as two:
        two.capture(20)
        assert two.persist() != OrderEnd(step=Step(20), failed="")
    assert newest_good(store).step == 30
    with nodes(tmp_path, checkpoint_ignore=old) as two:
        two.capture(20)
        assert two.persist() == OrderEnd(step=Step(20), failed="")
    assert steps(store) == [20]
    assert newest_good(store, ignore=old).step == 20
    assert_whole(tmp_path, 20)


def test_what_nobody_wants_to_keep_is_removed(tmp_path: Path) -> None:
    with nodes(tmp_path, checkpoint_keep="last:1,every:20") as two:
        for step in (10, 20, 30):
            two.capture(step)
            two.persist()
        two.wait(lambda: len(two.events("checkpoint-removed")) == 1)
    assert steps(LocalStore(tmp_path / "disk")) == [20, 30]


def test_the_newest_one_that_is_damaged_is_passed_over(tmp_path: Path) -> None:
    with nodes(tmp_path) as two:
        for step in (10, 20):
            two.capture(step)
            two.persist()
    store = LocalStore(tmp_path / "disk")
    file = next(p for p in (tmp_path / "disk/step-20/tensors").rglob("c*") if p.is_file())
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    load(store, Step(20))  # sizes and names say nothing
    found = newest_good(store)
    assert found.step == 10
    assert list(found.damaged) == [20]
    assert "is altered" in found.damaged[Step(20)]


def test_an_order_that_is_none_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with nodes(tmp_path) as two:
        persister = two.persisters[NodeId(0)]
        persister.take_message({"attempt": "x"}, {})
        assert "the coordinator's order is none" in caplog.text
        two.capture(10)
        assert two.persist() == OrderEnd(step=Step(10), failed="")


def test_a_store_fault_is_of_one_node_and_comes_back_from_the_environment() -> None:
    fault = StoreFault(kind=StoreFaultKind.KILL, node=2, seat=2, byte=77)
    environ = fault.to_environ()
    assert StoreFault.from_environ(environ, node=2) == fault
    assert StoreFault.from_environ(environ, node=1) is None
    assert StoreFault.from_environ({}, node=2) is None
    assert replace(fault, byte=1) != fault
