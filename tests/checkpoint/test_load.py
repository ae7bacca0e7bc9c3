"""Loading from boxes when something is wrong: damage, holes, names, values."""

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ftkit.checkpoint.arena import Arena, arena_path
from ftkit.checkpoint.box import Box, TensorBox
from ftkit.checkpoint.capture import Capture
from ftkit.checkpoint.chunks import Share
from ftkit.checkpoint.fetch import fetch
from ftkit.checkpoint.layout import ITEM_BYTES, StateLayout
from ftkit.checkpoint.load import load_state, small_of_seats
from ftkit.checkpoint.serve import RANGE_BYTES_MAX, ArenaServer
from ftkit.checkpoint.slabs import Head
from ftkit.checkpoint.sources import SnapshotSource
from ftkit.checkpoint.state import ProtectedState
from ftkit.core.errors import IntegrityError, StateChanged, WireError
from ftkit.core.ids import Generation, JobId, Seat, Step

from .helpers import (
    Training,
    assert_same,
    contents,
    make_arena,
    snapshot_of_seats,
    write_pattern,
)

STEP = Step(3)
JOB = JobId("t")


def damage(arena: Arena, name: str) -> None:
    """Flip one bit near the end of a tensor, in the file."""
    sealed = arena.find(STEP)
    entry = next(e for e in arena.head(sealed).layout.entries if e.name == name)
    slab = arena.slabs().index(sealed)
    at = arena.geometry.slab_at(slab) + arena.geometry.data_at + entry.at + entry.bytes - 1
    with arena.path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 4]))


class Replicas:
    """Two seats with the same state at step 3, each in its arena."""

    def __init__(self, folder):
        self.training = Training(seed=1)
        for step in range(1, STEP + 1):
            self.training.train(step)
        self.arenas = {}
        for seat in (Seat(0), Seat(1)):
            arena = make_arena(folder / f"{seat}.arena", self.training.state.layout())
            with Capture(arena, self.training.state) as capture:
                capture.begin(STEP, Generation(1))
            self.arenas[seat] = arena

    def damage(self, seat: int, name: str) -> None:
        damage(self.arenas[Seat(seat)], name)

    def sources(self, seat: int = 0):
        return snapshot_of_seats(self.arenas, STEP, seat=Seat(seat))[0]

    def small(self):
        return self.arenas[Seat(0)].head(self.arenas[Seat(0)].find(STEP)).small


@pytest.fixture
def replicas(tmp_path):
    made = Replicas(tmp_path)
    yield made
    for arena in made.arenas.values():
        arena.close()


WEIGHT = "model/4.weight"


def test_a_damaged_copy_is_replaced_by_the_next_and_the_report_says_so(replicas):
    replicas.damage(0, WEIGHT)
    other = Training(seed=2)
    report = load_state(other.state, replicas.sources(), small=replicas.small())
    assert_same(replicas.training.state, other.state)
    # Everything else that lies in the chunk is as bad.
    assert WEIGHT in {f.name for f in report.fallbacks}
    for fallback in report.fallbacks:
        assert fallback.source == "0.arena"
        assert "digest" in fallback.reason
    assert report.bytes_by_source[0] > report.bytes_by_source[1] > 0
    for step in range(4, 6):
        replicas.training.train(step)
        other.train(step)
    assert_same(replicas.training.state, other.state)


def test_no_good_copy_left_is_an_error_that_names_the_tensor(replicas):
    replicas.damage(0, WEIGHT)
    replicas.damage(1, WEIGHT)
    with pytest.raises(IntegrityError, match=r"no good copy is left of 1 .*model.*1\.arena: chunk"):
        load_state(Training(seed=2).state, replicas.sources(), small=replicas.small())


def test_a_part_by_name_touches_nothing_else(replicas):
    other = Training(seed=2)
    other.train(1)
    before, small = contents(other.state)
    report = load_state(other.state, replicas.sources(), names="model/4.*")
    after, small_after = contents(other.state)
    saved = contents(replicas.training.state)[0]
    chosen = {"model/4.weight", "model/4.bias"}
    assert report.tensors == len(chosen)
    assert report.bytes == sum(saved[n].nbytes for n in chosen)
    assert small_after == small
    for name, tensor in after.items():
        assert torch.equal(tensor, (saved if name in chosen else before)[name]), name
    assert not torch.equal(before[WEIGHT], saved[WEIGHT])


def test_only_the_chunks_that_are_needed_are_read(replicas):
    """Damage elsewhere goes unnoticed, because nobody looks there."""
    replicas.damage(0, "model/0.weight")
    report = load_state(Training(seed=2).state, replicas.sources(), names="*4.weight/exp_avg")
    assert not report.fallbacks


def test_a_slab_that_is_overwritten_while_it_is_read_is_not_believed(replicas):
    sources, small = replicas.sources(), replicas.small()
    arena = replicas.arenas[Seat(0)]
    for step in (4, 5, 6):
        writer = arena.start(Step(step), Generation(1), replicas.training.state.layout())
        writer.digest(range(len(writer.table)))
        writer.seal(b"{}")
    other = Training(seed=2)
    report = load_state(other.state, sources, small=small)
    assert_same(replicas.training.state, other.state)
    assert report.bytes_by_source[0] == 0
    assert "overwritten" in report.fallbacks[0].reason


class Flaky:
    """A source that is cut off after some reads."""

    def __init__(self, inner, reads: int, error: Exception) -> None:
        self.inner, self.reads, self.error = inner, reads, error
        self.asked = 0

    threads = 1

    def entries(self):
        return self.inner.entries()

    def read(self, name, box, out, /):
        self.asked += 1
        if self.asked > self.reads:
            out[:] = b"\xee" * len(out)
            raise self.error
        self.inner.read(name, box, out)


@pytest.mark.parametrize("error", [WireError("hung up"), OSError("no route"), TimeoutError("late")])
def test_a_source_that_goes_away_is_asked_no_more(replicas, error):
    first, second = replicas.sources()
    flaky = Flaky(first, 5, error)
    other = Training(seed=2)
    report = load_state(other.state, [flaky, second], small=replicas.small())
    assert_same(replicas.training.state, other.state)
    assert flaky.asked == 6
    assert len(report.fallbacks) == 1


def test_a_bug_in_a_source_is_not_taken_for_damage(replicas):
    first, second = replicas.sources()
    with pytest.raises(KeyError):
        load_state(Training().state, [Flaky(first, 2, KeyError("x")), second])


def test_missing_and_unexpected_names_other_shapes_and_dtypes(replicas):
    small = replicas.small()
    other = Training(width=4)
    before = contents(other.state)[0]
    with pytest.raises(
        StateChanged, match=r"model/0.weight is float32\[8, 3.*saved.*float32\[4, 3"
    ):
        load_state(other.state, replicas.sources(), small=small)
    assert all(torch.equal(t, before[n]) for n, t in contents(other.state)[0].items())

    double = ProtectedState(model=Training().model.double())
    with pytest.raises(
        StateChanged, match=r"model/0.weight is float32\[8, 3.*saved.*float64\[8, 3"
    ):
        load_state(double, replicas.sources(), names="model/*")

    bare = ProtectedState(model=nn.Linear(2, 2))
    with pytest.raises(StateChanged) as caught:
        load_state(bare, replicas.sources())
    assert "missing: model/bias, model/weight" in str(caught.value)
    assert "unexpected: model/0.bias" in str(caught.value)

    model = Training(seed=2).model
    model.add_module("head", nn.Linear(1, 1))
    model.get_submodule("head").get_parameter("weight").data.fill_(7)
    load_state(ProtectedState(model=model), replicas.sources(), strict=False)
    assert model.get_submodule("head").get_parameter("weight").item() == 7
    assert torch.equal(
        model.get_submodule("4").get_parameter("weight"),
        replicas.training.model.get_submodule("4").get_parameter("weight"),
    )


def test_a_pattern_and_the_small_state_exclude_each_other(replicas):
    with pytest.raises(ValueError, match="small state"):
        load_state(Training().state, replicas.sources(), small={}, names="*")


def test_parameters_may_come_in_another_order(replicas):
    other = Training(seed=2)
    other.optimizer = torch.optim.AdamW(reversed(list(other.model.parameters())), lr=5.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(other.optimizer, [9])
    state = ProtectedState(model=other.model, optimizer=other.optimizer, scheduler=scheduler)
    load_state(state, replicas.sources(), small=replicas.small())
    mine, saved = contents(state)[0], contents(replicas.training.state)[0]
    assert mine.keys() == saved.keys()
    assert all(torch.equal(t, saved[n]) for n, t in mine.items())
    weight = other.model.get_submodule("4").get_parameter("weight")
    assert torch.equal(
        other.optimizer.state[weight]["exp_avg"], saved[f"optimizer/state/{WEIGHT}/exp_avg"]
    )
    assert other.optimizer.param_groups[0]["lr"] == 5e-4


class Dice:
    """A random generator, as protected state: its own on every seat."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, object]:
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.generator.set_state(state["state"])

    def roll(self) -> float:
        return torch.rand(1, generator=self.generator).item()


def dicing(tmp_path):
    """Two seats whose models are equal and whose generators are not."""
    arenas, rolls = {}, {}
    for seat in (Seat(0), Seat(1)):
        torch.manual_seed(0)
        dice = Dice(seat)
        state = ProtectedState(model=nn.Linear(2, 2), dice=dice)
        arenas[seat] = make_arena(tmp_path / f"{seat}.arena", state.layout())
        with Capture(arenas[seat], state) as capture:
            capture.begin(STEP, Generation(1))
        rolls[seat] = dice.roll()
    return arenas, rolls


def load_dice(arenas, seat):
    dice = Dice(77)
    fresh = Dice(77).roll()
    sources, by_seat = snapshot_of_seats(arenas, STEP, seat=Seat(seat))
    smalls = {s: source.head.small for s, source in by_seat.items()}
    small = small_of_seats(smalls, Seat(seat), per_seat=["dice"])
    state = ProtectedState(model=nn.Linear(2, 2), dice=dice)
    load_state(state, sources, small=small, per_seat=["dice"])
    return dice.roll(), fresh


def test_what_is_a_seats_own_stays_with_the_seat(tmp_path):
    arenas, rolls = dicing(tmp_path)
    assert load_dice(arenas, 0)[0] == rolls[0]
    assert load_dice(arenas, 1)[0] == rolls[1] != rolls[0]
    rolled, fresh = load_dice(arenas, 2)
    assert rolled == fresh, "a new seat keeps its own"


def test_a_seats_own_is_not_replaced_by_anothers_when_damaged(tmp_path):
    arenas, _ = dicing(tmp_path)
    damage(arenas[Seat(1)], "dice/state")
    with pytest.raises(IntegrityError, match="dice/state"):
        load_dice(arenas, 1)


# ------------------------------------------------------------------------- snapshot sources

LAYOUT = StateLayout.of_boxes(
    [
        TensorBox("a", "float32", (9, 5), Box((2, 0), (6, 5))),
        TensorBox("a", "float32", (9, 5), Box((8, 0), (1, 5))),
        TensorBox("b", "bfloat16", (4, 6, 3), Box((0, 2, 0), (4, 3, 3))),
        TensorBox("c", "complex128", (), Box((), ())),
        TensorBox("d", "int64", (3, 0), Box((0, 0), (3, 0))),
        TensorBox("e", "uint8", (70,), Box((10,), (60,))),
    ],
    small_bytes=64,
)


@pytest.fixture(scope="module", params=[16, 100, 1 << 20])
def snapshot(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("snapshot") / "arena"
    with make_arena(path, LAYOUT, chunk_bytes=request.param) as arena:
        write_pattern(arena, LAYOUT, STEP)
        sealed = arena.find(STEP)
        yield arena.head(sealed), bytes(arena.data(sealed))


def source_of(head: Head, data: bytes, *, in_place: bool) -> SnapshotSource:
    """A part in memory, read in place or, as from far away, chunk by chunk."""
    size = head.sealed.chunk_bytes

    def blocks(chunks):
        assert len(chunks) <= RANGE_BYTES_MAX // size or in_place
        for chunk in chunks:
            block = memoryview(data)[chunk * size : (chunk + 1) * size]
            head.check(chunk, block)
            yield block

    return (
        SnapshotSource(head, blocks, name="s", memory=lambda: memoryview(data))
        if in_place
        else SnapshotSource(head, blocks, name="s")
    )


def elements(entry, data: bytes):
    """The reference: an entry's elements, each as a row of bytes."""
    item = ITEM_BYTES[entry.dtype]
    flat = np.frombuffer(data, np.uint8)[entry.at : entry.at + entry.bytes]
    return flat.reshape(*entry.shape, item)


@given(data=st.data(), in_place=st.booleans())
def test_any_boxes_are_read_as_they_lie(snapshot, data, in_place):
    head, raw = snapshot
    source = source_of(head, raw, in_place=in_place)
    for _ in range(data.draw(st.integers(1, 3))):
        read_one(source, raw, data)


def read_one(source, raw, data):
    entry = data.draw(st.sampled_from(LAYOUT.entries))
    ends = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in entry.shape]
    inner = Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))
    out = bytearray(inner.elements * ITEM_BYTES[entry.dtype])
    source.read(entry.name, inner.shifted(entry.offsets), memoryview(out))
    assert bytes(out) == elements(entry, raw)[inner.slices].tobytes()


@given(data=st.data(), in_place=st.booleans())
def test_a_flipped_bit_is_noticed_by_who_reads_its_chunk_and_nobody_else(snapshot, data, in_place):
    head, raw = snapshot
    size = head.sealed.chunk_bytes
    at = data.draw(st.integers(0, len(raw) - 1))
    bad = bytearray(raw)
    bad[at] ^= 1 << data.draw(st.integers(0, 7))
    source = source_of(head, bytes(bad), in_place=in_place)
    for entry in LAYOUT.entries:
        for row in range(entry.shape[0] if entry.shape else 1):
            shape = (1, *entry.shape[1:]) if entry.shape else ()
            inner = Box((row, *(0,) * (len(entry.shape) - 1)) if entry.shape else (), shape)
            count = inner.elements * ITEM_BYTES[entry.dtype]
            first = entry.at + row * count
            touched = range(first // size, (first + count - 1) // size + 1) if count else ()
            out = memoryview(bytearray(count))
            if at // size in touched:
                with pytest.raises(IntegrityError, match=f"chunk {at // size} "):
                    source.read(entry.name, inner.shifted(entry.offsets), out)
            else:
                source.read(entry.name, inner.shifted(entry.offsets), out)


@given(data=st.data(), in_place=st.booleans())
def test_a_part_offers_the_boxes_that_lie_in_it(snapshot, data, in_place):
    whole, raw = snapshot
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(whole.digests))] * 2)))
    first, end = (min(c * whole.sealed.chunk_bytes, len(raw)) for c in (start, stop))
    sealed = replace(
        whole.sealed, first_byte=start * whole.sealed.chunk_bytes, data_bytes=end - first
    )
    head = replace(whole, sealed=sealed, digests=whole.digests[start:stop])
    source = source_of(head, raw[first:end], in_place=in_place)
    offered = {(e.name, e.offsets): np.zeros(e.shape, dtype=int) for e in LAYOUT.entries}
    for name, dtype, _, box in source.entries():
        out = bytearray(box.elements * ITEM_BYTES[dtype])
        source.read(name, box, memoryview(out))
        for entry in LAYOUT.entries:
            if entry.name == name and entry.box.intersect(box) == box:
                inner = box.within(entry.box)
                offered[name, entry.offsets][inner.slices] += 1
                assert bytes(out) == elements(entry, raw)[inner.slices].tobytes()
    for entry in LAYOUT.entries:
        item = ITEM_BYTES[entry.dtype]
        inside = [
            first <= entry.at + i * item and entry.at + (i + 1) * item <= end
            for i in range(entry.bytes // item)
        ]
        assert offered[entry.name, entry.offsets].reshape(-1).tolist() == list(map(int, inside))


@pytest.fixture
def shared_out(tmp_path):
    """Three replicas, each with its share of one state."""
    training = Training(seed=1)
    training.train(1)
    paths = [arena_path(JOB, Seat(seat), tmp_path) for seat in range(3)]
    for seat, path in enumerate(paths):
        with (
            make_arena(path, training.state.layout()) as arena,
            Capture(arena, training.state) as capture,
        ):
            capture.begin(STEP, Generation(1), share=Share(seat, 3))
    return training, paths


def test_the_shares_of_replicas_are_one_state(shared_out):
    training, paths = shared_out
    with ExitStack() as opened:
        arenas = {Seat(s): opened.enter_context(Arena.open(p)) for s, p in enumerate(paths)}
        sources, by_seat = snapshot_of_seats(arenas, STEP, seat=Seat(1))
        other = Training(seed=2)
        report = load_state(other.state, sources, small=by_seat[Seat(2)].head.small)
        assert_same(training.state, other.state)
        assert min(report.bytes_by_source) > 0
        with pytest.raises(IntegrityError, match="no good copy is left"):
            load_state(other.state, sources[1:], small=by_seat[Seat(2)].head.small)


def test_parts_on_another_node_are_read_through_its_byte_server(shared_out, tmp_path):
    """A damaged chunk is an answer like others: what is asked after it is answered too."""
    training, paths = shared_out
    with Arena.open(paths[0], writable=True) as arena:
        sealed = arena.find(STEP)
        slab = arena.slabs().index(sealed)
        arena._file.bytes[arena.geometry.slab_at(slab) + arena.geometry.data_at] ^= 1
        small = arena.head(sealed).small
        first = arena.head(sealed).layout.entries[0].name
    server = ArenaServer(tmp_path, JOB, b"secret")
    try:
        with ExitStack() as opened:
            parts = {
                path.name: opened.enter_context(
                    fetch(server.address, b"secret", path.name, STEP, Generation(1))
                )
                for path in paths
            }
            sources = [
                SnapshotSource(part.head, part.blocks, name=f"far {name}")
                for name, part in parts.items()
            ]
            other = Training(seed=2)
            with pytest.raises(IntegrityError, match=rf"{first}.*far .*-0\.arena: chunk 0 of"):
                load_state(other.state, sources, small=small)
            names = [n for n in contents(training.state)[0] if n.startswith("model/4")]
            report = load_state(other.state, sources, names="model/4.*")
            assert report.tensors == len(names)
            assert not report.fallbacks
    finally:
        server.close()
    found, saved = contents(other.state)[0], contents(training.state)[0]
    assert all(torch.equal(found[n], saved[n]) for n in names)


def test_a_box_that_is_not_held_is_the_callers_mistake(snapshot):
    head, raw = snapshot
    source = source_of(head, raw, in_place=True)
    with pytest.raises(ValueError, match=r"s does not hold \[2, 5\] at \[7, 0\] of a"):
        source.read("a", Box((7, 0), (2, 5)), memoryview(bytearray(40)))


def test_a_lost_seat_is_left_out_and_a_hole_is_named(tmp_path):
    halves = []
    for first in (0, 2):
        box = TensorBox("model/weight", "float32", (4, 2), Box((first, 0), (2, 2)))
        layout = StateLayout.of_boxes([box], small_bytes=64)
        arena = make_arena(tmp_path / f"{first}", layout)
        write_pattern(arena, layout, STEP if first else STEP + 1)
        halves.append(arena)
    arenas = dict(zip((Seat(0), Seat(1)), halves, strict=True))
    sources, by_seat = snapshot_of_seats(arenas, STEP, seat=Seat(0))
    assert list(by_seat) == [1]
    model = nn.Linear(2, 4, bias=False)
    before = model.weight.detach().clone()
    with pytest.raises(
        IntegrityError, match=r"model/weight: float32\[2, 2\] at \[0, 0\] of \[4, 2"
    ):
        load_state(ProtectedState(model=model), sources)
    assert torch.equal(model.weight, before)
