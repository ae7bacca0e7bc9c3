"""Where ours differs from gloo on purpose: which cases, how, and why. `test_beyond` checks
that what ours answers there is right. Nothing else may differ, and each of these must."""

import re
from typing import NamedTuple

from .case import Difference


class Known(NamedTuple):
    pattern: str
    kind: str
    why: str
    sizes: tuple[int, ...] = (2, 3)


KNOWN = [
    Known(
        r"(all_reduce|reduce|reduce_scatter(_single)?) avg torch\.u?int\d+",
        "gloo only",
        "integers are averaged toward zero; gloo averages floats alone",
    ),
    Known(
        r"(reduce|reduce_scatter(_single)?) product torch\.complex\d+",
        "gloo only",
        "complex numbers are multiplied",
    ),
    Known(r"all_reduce sparse avg", "gloo only", "sparse tensors are averaged as well"),
    Known(
        r"all_reduce (min|max) not a number",
        "values",
        "NaN wins on every rank, as in torch.minimum; with gloo the order decides",
    ),
    Known(
        r"gather to \d torch\.complex\d+ .*", "gloo only", "complex numbers are gathered as well"
    ),
    Known(
        r"all_gather_single (stacked .*|torch\.float32 \(\) plain)",
        "gloo only",
        "a tensor with one entry a rank takes the gathered ones stacked, as torch documents",
    ),
    Known(
        r"all_to_all uneven \d+",
        "gloo only",
        "each pair of ranks may have a shape of its own, as torch documents",
    ),
    Known(
        r"all_to_all_single indivisible",
        "ours only",
        "gloo takes the 7 rows of 2 ranks and moves 6 of them",
        (2,),
    ),
    Known(r"coalesced all_reduce on a device", "gloo only", "coalescing by device exists in ours"),
]


def unexplained(found: list[Difference]) -> list[Difference]:
    """The differences that are not listed here."""
    return [d for d in found if not any(_covers(known, d) for known in KNOWN)]


def unused(found: list[Difference], size: int) -> list[Known]:
    """What is listed here and did not differ: it has to go."""
    return [k for k in KNOWN if size in k.sizes and not any(_covers(k, d) for d in found)]


def _covers(known: Known, difference: Difference) -> bool:
    return difference.kind == known.kind and bool(re.fullmatch(known.pattern, difference.case))
