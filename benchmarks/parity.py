"""How fast is parity made and lost data rebuilt, against copying that data once?

For each code k + m, in one process and on one thread, over and over in turn::

    memcpy      the k data shards into memory that has its pages
    encode      their m parity shards
    rebuild     the first min(k, m) data shards, from the rest and the parity
    ... apart   the first and the last one, where two are lost and others lie between
    numpy ...   both by the engine that needs no ISA-L
    pyeclib ... both through PyEClib's own API, on less data

Shards lie a few pages and lines further apart than their length: at the distance of a power of
two they would share cache sets and memory banks, which costs all that read many at once, and
pieces of a state lie anywhere.

What counts is the best processor time of each: all of it is one thread that never waits, and
noise only ever adds. Every rebuilt byte is compared, and the parity of the engines too.

    python -m benchmarks.parity [--megabytes 256] [--rounds 9] [--quick] [--json] [--save]
"""

import ctypes
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from benchmarks.figures import Figure, Report, finish, parser, say
from ftkit.checkpoint.erasure import Codec, Engine, best_engine
from ftkit.checkpoint.raw import address

CODES = [(k, m) for k in range(2, 9) for m in (1, 2, 3)]
#: PyEClib is slow, and its speed does not depend on the size.
PYECLIB_BYTES_MAX = 32 << 20
#: Between two shards.
GAP_BYTES = 3 * 4096 + 5 * 64

Bytes = NDArray[np.uint8]


@dataclass
class Row:
    """The best time of each kind for one code, in seconds per GB of data."""

    k: int
    m: int
    seconds: dict[str, float] = field(default_factory=dict)

    def against(self, kind: str, other: str = "memcpy") -> float:
        return self.seconds[kind] / self.seconds[other]


class Memory:
    """The data, room for a copy, and room for parity; all pages there, lines not shared."""

    def __init__(self, total: int) -> None:
        self.values = np.random.default_rng(0).integers(0, 256, total, dtype=np.uint8)
        room = total + 8 * GAP_BYTES
        self.data, self.copy, self.parity, self.other = (
            np.ones(room * n // 2, np.uint8) for n in (2, 2, 3, 3)
        )

    def shards(self, k: int, m: int) -> tuple[list[Bytes], list[Bytes], list[Bytes], list[Bytes]]:
        """Data, copy, parity and other parity, cut for a code."""
        length = self.values.nbytes // k // 4096 * 4096

        def cut(memory: Bytes, count: int) -> list[Bytes]:
            return [memory[i * (length + GAP_BYTES) :][:length] for i in range(count)]

        data = cut(self.data, k)
        for number, shard in enumerate(data):
            shard[:] = self.values[number * length :][:length]
        return data, cut(self.copy, k), cut(self.parity, m), cut(self.other, m)


def measure(total: int, rounds: int, codes: Sequence[tuple[int, int]]) -> Report:
    """Every code in turn."""
    memory, rows, problems, parities = Memory(total), list[Row](), list[str](), 0
    for k, m in codes:
        data, copy, parity, other = memory.shards(k, m)
        row = Row(k, m)
        rows.append(row)
        length = data[0].nbytes
        gigabytes = k * length / 1e9
        jobs: dict[str, Callable[[], None]] = {"memcpy": partial(_copy, data, copy)}
        engines = [Engine.NUMPY, *({best_engine()} - {Engine.NUMPY})]
        for engine, out in zip(engines, (other, parity), strict=False):
            name = "numpy " if engine is Engine.NUMPY else ""
            jobs |= _coding(Codec(k, m, engine), name, data, copy, out)
        for _ in range(rounds):
            for kind, job in jobs.items():
                start = time.thread_time()
                job()
                spent = (time.thread_time() - start) / gigabytes
                row.seconds[kind] = min(spent, row.seconds.get(kind, spent))
                lost = _lost(k, m, apart=kind.endswith("apart"))
                if "rebuild" in kind and any(_differ(copy[i], data[i]) for i in lost):
                    problems.append(f"{kind} {k}+{m} gave wrong bytes")
                for shard in lost:
                    copy[shard].fill(0)  # so that what is compared next was written by the next
        if len(engines) > 1 and any(map(_differ, parity, other)):
            problems.append(f"the engines made different parity for {k}+{m}")
        parities = zlib.crc32(np.concatenate(other).data, parities)
        row.seconds |= _pyeclib(k, m, memory.values[: min(total, PYECLIB_BYTES_MAX)])
        say(_line(row))
    return report(rows, problems, f"{parities:08x}")


def _copy(sources: Sequence[Bytes], targets: Sequence[Bytes]) -> None:
    for source, target in zip(sources, targets, strict=True):
        ctypes.memmove(address(target), address(source), source.nbytes)


def _differ(left: Bytes, right: Bytes) -> bool:
    return not np.array_equal(left, right)


def _coding(
    codec: Codec, name: str, data: Sequence[Bytes], copy: Sequence[Bytes], parity: Sequence[Bytes]
) -> dict[str, Callable[[], None]]:
    def rebuild(lost: Sequence[int]) -> Callable[[], None]:
        rest = {i: s for i, s in enumerate([*data, *parity]) if i not in lost}
        return partial(codec.rebuild, rest, {i: copy[i] for i in lost})

    k, m = codec.k, codec.m
    jobs: dict[str, Callable[[], None]] = {
        f"{name}encode": partial(codec.encode, data, parity),
        f"{name}rebuild": rebuild(_lost(k, m)),
    }
    if m == 2 and k > 2:
        jobs[f"{name}rebuild apart"] = rebuild(_lost(k, m, apart=True))
    return jobs


def _lost(k: int, m: int, *, apart: bool = False) -> Sequence[int]:
    return (0, k - 1) if apart else range(min(k, m))


def _pyeclib(k: int, m: int, data: Bytes) -> dict[str, float]:
    """Seconds per GB through PyEClib's API; nothing where it is not installed."""
    try:
        from pyeclib.ec_iface import ECDriver
    except ImportError:
        return {}
    driver = ECDriver(k=k, m=m, ec_type="isa_l_rs_cauchy")
    payload = data.tobytes()
    start = time.thread_time()
    fragments = driver.encode(payload)
    encoded = time.thread_time()
    back = driver.decode(fragments[min(k, m) :])
    decoded = time.thread_time()
    if back != payload:
        raise RuntimeError(f"PyEClib did not give back what it encoded with {k}+{m}")
    gigabytes = len(payload) / 1e9
    return {
        "pyeclib encode": (encoded - start) / gigabytes,
        "pyeclib rebuild": (decoded - encoded) / gigabytes,
    }


def report(rows: Sequence[Row], problems: Sequence[str], parity: str) -> Report:
    """The figures with goals, out of what was measured; pure."""
    figures = list[Figure]()
    for kind in ("encode", "rebuild"):
        if kind in rows[0].seconds:
            worst = max(rows, key=lambda row: row.against(kind))
            figures.append(
                Figure(
                    name=f"{kind}, worst code: time / memcpy of the data",
                    value=worst.against(kind),
                    unit="x",
                    at_most=1 / 0.8,
                    against=f"{worst.k}+{worst.m}: memcpy {_speed(worst, 'memcpy')}",
                )
            )
            if f"pyeclib {kind}" in rows[0].seconds:
                least = max(rows, key=lambda row: row.against(kind, f"pyeclib {kind}"))
                figures.append(
                    Figure(
                        name=f"{kind}, worst code: time / PyEClib's API",
                        value=least.against(kind, f"pyeclib {kind}"),
                        unit="x",
                        against=f"{least.k}+{least.m}: {_speed(least, f'pyeclib {kind}')}",
                    )
                )
        plain = max((r for r in rows if r.m <= 2), key=lambda r: r.seconds[f"numpy {kind}"])
        figures.append(
            Figure(
                name=f"{kind} without ISA-L, worst code with m <= 2",
                value=plain.seconds[f"numpy {kind}"],
                unit="s/GB",
                at_most=1 / 5,
                against=f"{plain.k}+{plain.m}: {_speed(plain, f'numpy {kind}')}",
            )
        )
    if apart := [r for r in rows if "numpy rebuild apart" in r.seconds]:
        worst = max(apart, key=lambda r: r.seconds["numpy rebuild apart"])
        figures.append(
            Figure(
                name="the same, two lost that lie apart",
                value=worst.seconds["numpy rebuild apart"],
                unit="s/GB",
                against=f"{worst.k}+{worst.m}: {_speed(worst, 'numpy rebuild apart')}",
            )
        )
    return Report(
        name="parity",
        figures=figures,
        computed={"CRC-32 of all parity": parity},
        problems=problems,
        notes=[f"engine: {best_engine()}"],
        samples=[{"k": r.k, "m": r.m, "s_per_GB": r.seconds} for r in rows],
    )


def _speed(row: Row, kind: str) -> str:
    return f"{1 / row.seconds[kind]:.1f} GB/s"


def _line(row: Row) -> str:
    return f"{row.k}+{row.m}  GB/s of data: " + "  ".join(
        f"{kind} {1 / spent:.1f}" for kind, spent in row.seconds.items()
    )


def main(argv: Sequence[str] | None = None) -> int:
    made = parser(__doc__)
    made.add_argument("--megabytes", type=int, help="data (256; quick: 128)")
    made.add_argument("--rounds", type=int, help="times each is done (9; quick: 3)")
    options = made.parse_args(argv)
    total = (options.megabytes or (128 if options.quick else 256)) << 20
    found = measure(total, options.rounds or (3 if options.quick else 9), CODES)
    return finish(replace(found, options=vars(options)), options)


if __name__ == "__main__":
    sys.exit(main())
