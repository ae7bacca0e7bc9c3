"""State hashes: 64 bits that tell whether two ranks hold the same tensor, bit for bit.

A hash is XXH3-64 of the elements' bytes in row-major order, so it is the same whatever the
strides, and on whatever device. XXH3 was chosen by measurement: on one core it reads 28 GB/s,
three times the weighted 64-bit sum that could also run on a GPU, and it has no blind spot. (In
a sum modulo 2**64 with odd weights two flipped top bits cancel, and the top bit of a word is
the sign of a float: a pair of zeros with other signs would pass.) A tensor elsewhere is brought
to the host block by block.

It finds accidents, not adversaries: XXH3 is no cryptographic hash.
"""

import json
from collections.abc import Iterator, Mapping

import torch
import xxhash

from ftkit.collectives.arithmetic import as_bytes, view_of

#: What is copied at a time of a tensor that is not one run of host memory, in bytes.
BLOCK_BYTES = 4 << 20


def hash_of(tensor: torch.Tensor) -> int:
    """The hash of a dense tensor of any dtype, shape, strides and device; 0 <= hash < 2**64.

    Blocks, with the GIL released for all but small tensors, and reads the tensor once; whatever
    changes it meanwhile makes the hash meaningless. Shape and dtype are not part of it
    (`layout_of` has them), and -0.0 and 0.0 differ, as do two NaNs of other bits.

    Raises:
      ValueError: the tensor is sparse.
    """
    if tensor.layout != torch.strided:
        raise ValueError(f"a tensor of layout {tensor.layout} has no bytes in order")
    digest = xxhash.xxh3_64()
    for block in _blocks(tensor.detach()):
        digest.update(view_of(as_bytes(block)))
    return digest.intdigest()


def layout_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """64 bits over names, dtypes and shapes, in order: equal where hashes can be compared."""
    text = json.dumps([[name, str(t.dtype), list(t.shape)] for name, t in tensors.items()])
    return xxhash.xxh3_64_intdigest(text.encode())


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The elements in row-major order, as contiguous pieces in host memory."""
    plain = tensor.resolve_conj().resolve_neg()
    if plain.device.type == "cpu" and plain.is_contiguous():
        yield plain
        return
    nbytes = plain.numel() * plain.element_size()
    if plain.dim() == 0 or nbytes <= BLOCK_BYTES:
        yield plain.cpu().contiguous()
        return
    rows = plain.shape[0]
    step = BLOCK_BYTES * rows // nbytes
    if step == 0:
        # One row is more than a block: its own rows are smaller.
        for row in plain:
            yield from _blocks(row)
        return
    for first in range(0, rows, step):
        yield plain[first : first + step].cpu().contiguous()
