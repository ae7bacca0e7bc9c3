"""How long until a checkpoint is durable, and how large is it? Against DCP and zarr-python.

One process, one state (float32 weights, both moments of Adam, its step counters), and each
way of saving in turn, round after round; every one ends with fsync, so that what is timed is
time to durable::

    ftkit   write + commit: hand-laid zarr shards, CRC-32C of every chunk, files and folders
            fsynced, manifest, commit record
    dcp     dcp.save: one file, fsynced by its default; no checksums, no fsync of the folder
    zarr    zarr-python: the same arrays, shards, chunks and crc32c codec, then every file
            fsynced; no manifest
    raw     one file of the same bytes, fsynced: what the disk can do

Codecs are compared by the size and time of the same weights as bfloat16 and float32.

    python -m benchmarks.persist [--mib 768] [--rounds 5] [--quick] [--json] [--save]
"""

import hashlib
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import zarr
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from zarr.codecs import Crc32cCodec

from benchmarks.figures import Figure, Report, finish, parser, say
from benchmarks.jobs import scratch
from ftkit.checkpoint.memory import as_numpy
from ftkit.checkpoint.persist.boxes import Box
from ftkit.checkpoint.persist.checkpoint import open_checkpoint
from ftkit.checkpoint.persist.codecs import Codec, CodecPolicy
from ftkit.checkpoint.persist.commit import CommitRecord, begin, commit
from ftkit.checkpoint.persist.lease import Lease
from ftkit.checkpoint.persist.local_store import LocalStore
from ftkit.checkpoint.persist.plan import CheckpointPlan, Piece
from ftkit.checkpoint.persist.write import write
from ftkit.core.ids import JobId, Step

State = Mapping[str, torch.Tensor]


def gpt_state(total_bytes: int) -> dict[str, torch.Tensor]:
    """Weights, moments and counters of a GPT of about that size; the same for every run."""
    generator = torch.Generator().manual_seed(0)
    width = 768
    layer: dict[str, tuple[int, ...]] = {
        "attn.qkv": (3 * width, width),
        "attn.out": (width, width),
        "norm": (width,),
        "mlp.up": (4 * width, width),
        "mlp.down": (width, 4 * width),
        "mlp.bias": (4 * width,),
    }
    shapes: dict[str, tuple[int, ...]] = {"wte": (8000, width)}
    number = 0
    while 12 * sum(torch.Size(s).numel() for s in shapes.values()) < total_bytes:
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
        number += 1
    state = dict[str, torch.Tensor]()
    for name, shape in shapes.items():
        state[f"model/{name}"] = torch.randn(shape, generator=generator) * 0.02
        state[f"optimizer/{name}/exp_avg"] = torch.randn(shape, generator=generator) * 1e-4
        state[f"optimizer/{name}/exp_avg_sq"] = torch.rand(shape, generator=generator) * 1e-7
        state[f"optimizer/{name}/step"] = torch.tensor(471.0)
    return state


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return as_numpy(tensor).reshape(-1).view("u1").data


def pieces_of(state: State) -> list[Piece]:
    found = list[Piece]()
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.append(Piece(name, dtype, shape, (0,) * len(shape), shape, bytes_of(tensor)))
    return found


def save_ftkit(folder: Path, state: State, codec: CodecPolicy) -> CommitRecord:
    store, step, pieces = LocalStore(folder), Step(1), pieces_of(state)
    plan = CheckpointPlan.of(pieces, codec=codec)
    with Lease.take(store, JobId("benchmark")) as lease:
        begin(store, step, lease)
        return commit(store, step, plan, [write(store, step, plan, pieces)], lease)


def save_dcp(folder: Path, state: State) -> None:
    dcp_save(dict(state), checkpoint_id=folder, no_dist=True)


def save_zarr(folder: Path, state: State) -> None:
    plan = CheckpointPlan.of(pieces_of(state))
    group = zarr.open_group(folder, mode="w")
    for name, tensor in state.items():
        (made,) = plan.arrays[name]
        array = group.create_array(
            name.replace("/", "."),
            shape=made.whole,
            shards=made.grid.shard if made.grid.sharded else None,
            chunks=made.grid.chunk,
            dtype=made.dtype,
            filters=None,
            compressors=[Crc32cCodec()],
        )
        array[...] = tensor.numpy()
    for path in [*folder.rglob("*"), folder]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def save_raw(folder: Path, state: State) -> None:
    folder.mkdir()
    with (folder / "raw").open("wb", buffering=0) as file:
        for tensor in state.values():
            view = bytes_of(tensor)
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())


def timed(save: Callable[[], object]) -> float:
    # Dirty pages of what ran before must not be written on this one's time.
    os.sync()
    start = time.perf_counter()
    save()
    return time.perf_counter() - start


def holds(folder: Path, state: State) -> bool:
    """Whether our checkpoint gives back the state, byte for byte."""
    found = open_checkpoint(LocalStore(folder))
    for name, tensor in state.items():
        out = bytearray(tensor.nbytes)
        found.read(name, Box.whole(tuple(tensor.shape)), memoryview(out))
        if out != bytes_of(tensor):
            return False
    return True


def compare(top: Path, state: State, rounds: int) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds to durable of each way, by round; and what went wrong."""
    ways: dict[str, Callable[[Path], object]] = {
        "ftkit": lambda f: save_ftkit(f, state, CodecPolicy.none()),
        "dcp": lambda f: save_dcp(f, state),
        "zarr": lambda f: save_zarr(f, state),
        "raw": lambda f: save_raw(f, state),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    problems = list[str]()
    for number in range(-1, rounds):  # the first round warms up and is not counted
        order = list(ways) if number % 2 else list(reversed(ways))
        for name in order:
            folder = top / name
            seconds = timed(lambda way=ways[name], folder=folder: way(folder))  # type: ignore[misc]
            if number >= 0:
                times[name].append(seconds)
                say(f"{name} {seconds:.3f} s")
            if name == "ftkit" and number < 0 and not holds(folder, state):
                problems.append("what ftkit saved is not what it read back")
            shutil.rmtree(folder)
    return times, problems


def codecs(top: Path, state: State, rounds: int) -> dict[str, dict[str, float]]:
    """Stored size / tensor size, and seconds, of each codec on weights of each dtype."""
    found = dict[str, dict[str, float]]()
    for dtype in (torch.bfloat16, torch.float32):
        weights = {n: t.to(dtype) for n, t in state.items() if n.startswith("model/")}
        for codec in Codec:
            policy = CodecPolicy(by_dtype={}, otherwise=codec)
            seconds, ratio = list[float](), 1.0
            for _ in range(rounds):
                folder = top / "codec"
                seconds.append(timed(lambda p=policy, f=folder, w=weights: save_ftkit(f, w, p)))  # type: ignore[misc]
                profile = open_checkpoint(LocalStore(folder)).record.profile
                ratio = profile.stored_bytes / profile.tensor_bytes
                shutil.rmtree(folder)
            name = f"{str(dtype).removeprefix('torch.')} {codec}"
            found[name] = {"stored_ratio": ratio, "seconds_p50": statistics.median(seconds)}
    return found


def report(
    times: Mapping[str, Sequence[float]],
    sizes: Mapping[str, Mapping[str, float]],
    total_bytes: int,
    problems: Sequence[str],
    computed: str,
    options: Mapping[str, object],
) -> Report:
    """The figures with goals; pure."""
    median = {name: statistics.median(found) for name, found in times.items()}

    def ratio(other: str) -> float:
        return statistics.median(a / b for a, b in zip(times["ftkit"], times[other], strict=True))

    def against(name: str) -> str:
        return f"{name} {median[name]:.3g} s, {total_bytes / median[name] / 1e9:.2f} GB/s"

    figures = [
        Figure(name="time to durable / dcp.save", value=ratio("dcp"), unit="x", at_most=1.0,
               against=against("dcp")),
        Figure(name="time to durable / zarr-python with the same layout", value=ratio("zarr"),
               unit="x", at_most=0.5, against=against("zarr")),
        Figure(name="time to durable / the disk's own, one raw file", value=ratio("raw"),
               unit="x", against=against("raw")),
        Figure(name="time to durable", value=median["ftkit"], unit="s", against=against("ftkit")),
    ]  # fmt: skip
    for dtype in ("bfloat16", "float32"):
        raw, packed = sizes[f"{dtype} {Codec.RAW}"], sizes[f"{dtype} {Codec.LZ4}"]
        figures += [
            Figure(name=f"{dtype} weights, LZ4 with bitshuffle: stored size / uncompressed",
                   value=packed["stored_ratio"] / raw["stored_ratio"], unit="x"),
            Figure(name=f"{dtype} weights, LZ4 with bitshuffle: time / uncompressed",
                   value=packed["seconds_p50"] / raw["seconds_p50"], unit="x",
                   against=f"{raw['seconds_p50']:.3g} s"),
        ]  # fmt: skip
    return Report(
        name="persist",
        figures=figures,
        computed={"state": computed},
        problems=problems,
        notes=[
            "weights are drawn at random, which compresses less than trained ones",
            "dcp.save writes no checksums; zarr-python's time ends with fsync of all its files",
        ],
        options=dict(options),
        samples={"seconds": {n: list(t) for n, t in times.items()}, "codecs": dict(sizes)},
    )


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--mib", type=int, help="size of the state in MiB (768; quick: 128)")
    made.add_argument("--rounds", type=int, help="rounds that count (5; quick: 2)")
    options = made.parse_args(argv)
    # DCP warns that there is no process group; there is not meant to be one.
    warnings.filterwarnings("ignore", module=r"torch\.distributed")
    state = gpt_state((options.mib or (128 if options.quick else 768)) << 20)
    rounds = options.rounds or (2 if options.quick else 5)
    total = sum(t.nbytes for t in state.values())
    hasher = hashlib.sha256()
    for tensor in state.values():
        hasher.update(bytes_of(tensor))
    with scratch("persist") as top:
        times, problems = compare(top, state, rounds)
        sizes = codecs(top, state, max(1, rounds // 2))
    found = report(times, sizes, total, problems, hasher.hexdigest(), vars(options))
    return finish(found, options)


if __name__ == "__main__":
    sys.exit(main())
