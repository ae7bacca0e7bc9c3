"""One rank of `quantized`: all forms of all-reduce in turn over one group, timed and checked."""

import argparse
import json
import time
import zlib
from pathlib import Path

import torch

from ftkit.collectives.config import CollectivesConfig, Transport
from ftkit.collectives.group import Group
from ftkit.collectives.quantized import all_reduce_quantized
from ftkit.core.ids import Generation, MemberId, NodeId, Seat
from ftkit.core.world import Member, World

#: fp32 is the plain all-reduce of the same group: a ring, as there are several hosts.
FORMS = ("fp32", "bf16", "int8", "fp8")
WAIT_S = 60.0


def main() -> None:
    options = _options()
    rank, size, count = options.rank, options.size, options.mib * (1 << 20) // 4
    torch.set_num_threads(1)
    group = Group(
        member=MemberId(rank),
        secret=b"a secret for this benchmark",
        host=options.host,
        config=CollectivesConfig(transport=Transport.TCP),
        on_fault=lambda *_: None,
    )
    group.edit(meet(group, options.folder, rank, size), timeout_s=WAIT_S)
    inputs = [torch.randn(count, generator=torch.Generator().manual_seed(r)) for r in range(size)]
    exact = torch.stack([x.double() for x in inputs]).sum(0)
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    errors, digests = dict[str, float](), dict[str, int]()
    for repetition in range(options.repetitions + 1):
        for form in FORMS:
            out = inputs[rank].clone()
            group.barrier().wait(WAIT_S)
            begin = time.perf_counter()
            reduce(group, out, form)
            took_s = time.perf_counter() - begin
            slowest = max(float(t) for t in group.exchange(repr(took_s).encode()).wait(WAIT_S))
            if repetition:  # the first one warms up
                times[form].append(slowest)
            errors[form] = float((out - exact).norm() / exact.norm())
            digests[form] = zlib.crc32(out.numpy().tobytes())
    group.barrier().wait(WAIT_S)
    group.close()
    print(json.dumps({"times": times, "errors": errors, "digests": digests}))


def reduce(group: Group, out: torch.Tensor, form: str) -> None:
    """Sum `out` in place, in one of FORMS."""
    if form == "fp32":
        group.all_reduce(out).wait(WAIT_S)
    else:
        all_reduce_quantized(group, out, codec=form).wait(WAIT_S)


def meet(group: Group, folder: Path, rank: int, size: int) -> World:
    """The world of all ranks, whose addresses are swapped through files. Blocks."""
    part = folder / f"{rank}.part"
    part.write_text(json.dumps(group.address))
    part.replace(folder / f"{rank}.json")
    deadline = time.monotonic() + WAIT_S
    while len(found := list(folder.glob("*.json"))) < size:
        if time.monotonic() > deadline:
            raise TimeoutError(f"only {len(found)} of {size} ranks have come")
        time.sleep(0.01)
    members = []
    for r in range(size):
        host, port = json.loads((folder / f"{r}.json").read_text())
        members.append(
            Member(member=MemberId(r), seat=Seat(r), node=NodeId(r), host=host, port=port)
        )
    return World.of(Generation(1), members)


def _options() -> argparse.Namespace:
    made = argparse.ArgumentParser()
    made.add_argument("--rank", type=int, required=True)
    made.add_argument("--size", type=int, required=True)
    made.add_argument("--host", required=True)
    made.add_argument("--mib", type=int, required=True)
    made.add_argument("--repetitions", type=int, required=True)
    made.add_argument("--folder", type=Path, required=True)
    return made.parse_args()


if __name__ == "__main__":
    main()
