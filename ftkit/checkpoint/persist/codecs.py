"""Codecs: how the bytes of a chunk are stored, and which dtype gets which (pure).

Measured on trained weights and moments: shuffled by bits, LZ4 takes bfloat16 to 1/1.3 at more
than the speed of a disk; float32 only to 1/1.15, at about the disk's speed, which pays where
the store is slower than that. zstd adds nothing at a third of the speed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from ftkit.checkpoint.layout import ITEM_BYTES
from ftkit.core.errors import IntegrityError


class Codec(StrEnum):
    """What a chunk goes through before its checksum. Values stand in manifests."""

    RAW = "raw"
    LZ4 = "blosc-lz4-bitshuffle"

    def pack(self, chunk: memoryview, item_bytes: int) -> memoryview:
        """The stored bytes of a chunk, without its checksum; RAW returns `chunk` itself."""
        if self is Codec.RAW:
            return chunk
        # Imported here, and below: whoever only looks at checkpoints decodes nothing.
        from numcodecs.blosc import Blosc

        # blosc shuffles by the size of the items it is given; numcodecs takes no void dtypes.
        items = np.frombuffer(chunk, dtype="c16" if item_bytes == 16 else f"u{item_bytes}")
        blosc = Blosc(cname="lz4", clevel=5, shuffle=Blosc.BITSHUFFLE, blocksize=0)
        return memoryview(blosc.encode(items))

    def unpack(self, stored: memoryview, out: memoryview) -> None:
        """Undo `pack` into `out`, which has the chunk's size.

        Raises:
          IntegrityError: the stored bytes make a chunk of another size, or none.
        """
        if self is Codec.RAW:
            if stored.nbytes != out.nbytes:
                raise IntegrityError(f"holds {stored.nbytes} bytes instead of {out.nbytes}")
            out[:] = stored
            return
        from numcodecs.blosc import Blosc

        try:
            Blosc().decode(stored, out)
        except (RuntimeError, ValueError) as error:
            raise IntegrityError(f"does not decompress to {out.nbytes} bytes: {error}") from error

    def metadata(self, item_bytes: int) -> list[dict[str, object]]:
        """The zarr v3 codecs between `bytes` and `crc32c`."""
        if self is Codec.RAW:
            return []
        settings = {
            "typesize": item_bytes,
            "cname": "lz4",
            "clevel": 5,
            "shuffle": "bitshuffle",
            "blocksize": 0,
        }
        return [{"name": "blosc", "configuration": settings}]


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecPolicy:
    """Which codec a tensor gets."""

    by_dtype: Mapping[str, Codec] = field(
        default_factory=lambda: dict.fromkeys(("bfloat16", "float16"), Codec.LZ4)
    )
    """By dtype; the default pays on a local disk."""
    otherwise: Codec = Codec.RAW
    small_bytes: int = 4096
    """A tensor of no more bytes than this is stored raw: there is nothing to win."""

    def __post_init__(self) -> None:
        for dtype in self.by_dtype:
            if dtype not in ITEM_BYTES:
                raise ValueError(f"the codec policy names dtype {dtype!r}, which is not known")

    @classmethod
    def none(cls) -> "CodecPolicy":
        """Nothing is compressed: the fastest where the disk is fast."""
        return cls(by_dtype={})

    @classmethod
    def remote(cls) -> "CodecPolicy":
        """Everything is compressed: for stores slower than about 2 GB/s a core."""
        return cls(by_dtype={}, otherwise=Codec.LZ4)

    def codec(self, dtype: str, total_bytes: int) -> Codec:
        """The codec of a tensor of that dtype and size."""
        if total_bytes <= self.small_bytes:
            return Codec.RAW
        return self.by_dtype.get(dtype, self.otherwise)
