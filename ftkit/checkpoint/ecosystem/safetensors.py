"""safetensors files, read and written by hand: a length, a JSON header, the tensors' bytes.

The format is small enough (https://huggingface.co/docs/safetensors, "Format") and its package
writes only from tensors that are all in memory. Here a file is written one tensor at a time, and
nothing of a file is believed before it was checked. The format has no checksums: a flipped bit
in the tensors is not noticed.

What is no tensor goes into the header's free text, as JSON under "ftkit", so that a state dict
comes back whole; other readers pass over it.
"""

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ftkit.checkpoint.ecosystem.lazy import LazyState, LazyTensor, memory_of
from ftkit.checkpoint.ecosystem.skeleton import checked, reference, renamed
from ftkit.checkpoint.layout import ITEM_BYTES
from ftkit.core.errors import IntegrityError, UsageError

_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16",
    "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

#: The package refuses larger headers, and so do we: they are memory before they are checked.
_HEADER_BYTES_MAX = 100_000_000
_LENGTH = 8
_OURS = "ftkit"
_METADATA = "__metadata__"


def write(
    file: BinaryIO, state: LazyState, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Write a state dict. Blocks; holds one tensor at a time.

    Args:
      file: open for writing, at its beginning.
      state: its tensors' names are written with "." for "/".
      progress: told the bytes of each tensor.

    Raises:
      UsageError: a dtype that the format lacks, names that become one, or a header too large.
        Nothing was written.
    """
    keys = {name: name.replace("/", ".") for name in state.tensors}
    owners = dict[str, str]()
    header, at = dict[str, Any](), 0
    for name, tensor in state.tensors.items():
        key = keys[name]
        if owners.setdefault(key, name) != name or key == _METADATA:
            raise UsageError(
                f"{name!r} and {owners[key]!r} would both be {key!r} in a safetensors file; "
                "rename one"
            )
        if tensor.dtype not in _CODES:
            raise UsageError(
                f"{name!r} is {tensor.dtype}, which safetensors has no word for; convert to dcp "
                "or torch"
            )
        header[key] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    skeleton = renamed(state.skeleton, keys.__getitem__)
    header[_METADATA] = {"format": "pt", _OURS: json.dumps(skeleton, separators=(",", ":"))}
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)  # the tensors begin at a multiple of 8
    if len(data) > _HEADER_BYTES_MAX:
        raise UsageError(
            f"names and values take {len(data)} bytes, a safetensors header at most "
            f"{_HEADER_BYTES_MAX}; convert a part"
        )
    file.write(len(data).to_bytes(_LENGTH, "little") + data)
    for tensor in state.tensors.values():
        file.write(memory_of(tensor.read()))
        progress(tensor.nbytes)


def read(path: Path) -> LazyState:
    """Open a file. Reads and checks its header; tensors are read when they are asked for.

    Raises:
      IntegrityError: it is no safetensors file, is cut short, or its header contradicts itself.
      UsageError: it has a dtype that torch lacks.
    """
    header, start = _header(path)
    notes = header.pop(_METADATA, {})
    tensors, spans = dict[str, LazyTensor](), list[tuple[int, int, str]]()
    for key, about in header.items():
        dtype, shape, (begin, end) = _entry(path, key, about)
        if end - begin != prod(shape) * ITEM_BYTES[dtype]:
            raise IntegrityError(
                f"{path}: {key!r} is {dtype}{list(shape)} in {end - begin} bytes, which does not fit"
            )
        spans.append((begin, end, key))
        tensors[key] = LazyTensor(dtype, shape, _reader(path, key, start + begin, dtype, shape))
    at = 0
    for begin, end, key in sorted(spans):
        if begin != at:
            raise IntegrityError(f"{path}: {key!r} begins at {begin}, what is before ends at {at}")
        at = end
    if (size := path.stat().st_size - start) != at:
        raise IntegrityError(f"{path} has {size} bytes of tensors, its header says {at}")
    return LazyState(_skeleton(path, notes, tensors), tensors)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        count = int.from_bytes(file.read(_LENGTH), "little")
        if size < _LENGTH or count > min(size - _LENGTH, _HEADER_BYTES_MAX):
            raise IntegrityError(
                f"{path} is no safetensors file, or is cut short: it has {size} bytes, and its "
                f"header should take {count}"
            )
        data = file.read(count)
    try:
        header = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: the header is not JSON of its format: {error}") from error
    if not isinstance(header, dict):
        raise IntegrityError(f"{path}: the header is no object")
    return header, _LENGTH + count


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _entry(path: Path, key: str, about: Any) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    match about:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            numbers = [*shape, begin, end]
            if any(type(n) is not int or n < 0 for n in numbers) or end < begin:
                raise IntegrityError(f"{path}: {key!r} has sizes that cannot be: {numbers}")
            if code not in _DTYPES:
                raise UsageError(f"{path}: {key!r} has dtype {code}, which torch lacks")
            return _DTYPES[code], tuple(shape), (begin, end)
        case _:
            raise IntegrityError(f"{path}: the header does not describe {key!r}")


def _reader(
    path: Path, key: str, at: int, dtype: str, shape: tuple[int, ...]
) -> Callable[[], torch.Tensor]:
    def read_tensor() -> torch.Tensor:
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        data = memory_of(tensor)
        with path.open("rb") as file:
            file.seek(at)
            count = file.readinto(data) if data.nbytes else 0
        if count != data.nbytes:
            raise IntegrityError(f"{path}: {key!r} ends after {count} of {data.nbytes} bytes")
        return tensor

    return read_tensor


def _skeleton(path: Path, notes: Any, tensors: dict[str, LazyTensor]) -> dict[str, Any]:
    text = notes.get(_OURS) if isinstance(notes, dict) else None
    if text is None:
        odd = [key for key in tensors if key.startswith("$")]
        if odd:
            raise UsageError(f"{path}: tensor {odd[0]!r} begins with $; rename it")
        return {key: reference(key) for key in tensors}
    try:
        return checked(json.loads(text), tensors)
    except (TypeError, ValueError, RecursionError, IntegrityError) as error:
        raise IntegrityError(f"{path}: the state dict in its header: {error}") from error
