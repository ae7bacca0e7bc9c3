"""Plain values: user state as JSON that comes back with the same Python types, never pickle.

JSON alone would turn tuples into lists and integer keys into strings, and cannot say NaN.
What it cannot say is written as an object with a single key that begins with "$".
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ftkit.core.errors import IntegrityError, UsageError


def encode(value: object, name: str, tensors: dict[str, torch.Tensor]) -> object:
    """Turn a value into JSON, putting tensors aside.

    Args:
      value: None, bool, int, float, str, tensors, and lists, tuples, dicts, Counters of them.
      name: what to call it in errors, and the stem of its tensors' names.
      tensors: receives the tensors found, by name.

    Raises:
      UsageError: something else is inside; the message names it.
    """
    match value:
        case None | bool() | str():
            return value
        case int() if type(value) is int:
            return value
        case float():
            # float() sheds numpy's float64, a subclass.
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        case torch.Tensor():
            tensors[name] = value.detach()
            return {"$tensor": name}
        case list():
            return [encode(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]
        case tuple():
            return {"$tuple": [encode(v, f"{name}/{i}", tensors) for i, v in enumerate(value)]}
        case dict():
            return _encode_dict(value, name, tensors)
        case _:
            raise UsageError(
                f"{name} is a {type(value).__name__}, which cannot be stored: state may hold "
                "None, bool, int, float, str, tensors, and lists, tuples and dicts of them "
                "(nothing is ever pickled). Convert it in state_dict()"
            )


def decode(value: Any, tensor: Callable[[str], torch.Tensor]) -> Any:
    """Undo `encode`.

    Args:
      value: what `encode` returned, after a trip through JSON.
      tensor: gives the tensor of a name.

    Raises:
      IntegrityError: `encode` never wrote this.
    """
    if isinstance(value, list):
        return [decode(v, tensor) for v in value]
    if not isinstance(value, dict):
        return value
    if not any(key.startswith("$") for key in value):
        return {key: decode(v, tensor) for key, v in value.items()}
    match value:
        case {"$float": str(text)}:
            return float(text)
        case {"$tensor": str(name)}:
            return tensor(name)
        case {"$tuple": list(items)}:
            return tuple(decode(v, tensor) for v in items)
        case {"$dict": list(items)}:
            return {decode(k, tensor): decode(v, tensor) for k, v in items}
        case {"$counter": list(items)}:
            return Counter({decode(k, tensor): decode(v, tensor) for k, v in items})
        case _:
            raise IntegrityError(f"small state has an unknown mark: {list(value)[:4]}")


def tensor_names(value: Any) -> Iterator[str]:
    """The names of the tensors that `decode` of this value, or a dict of such, would ask for."""
    match value:
        case {"$tensor": str(name)}:
            yield name
        case dict():
            for inner in value.values():
                yield from tensor_names(inner)
        case list():
            for inner in value:
                yield from tensor_names(inner)


def _encode_dict(
    value: Mapping[Any, object], name: str, tensors: dict[str, torch.Tensor]
) -> object:
    if type(value) not in (dict, OrderedDict, Counter):
        raise UsageError(
            f"{name} is a {type(value).__name__}, a kind of dict that would come back as another; "
            "convert it to a dict in state_dict()"
        )
    plain = all(type(key) is str and not key.startswith("$") for key in value)
    if plain and type(value) is not Counter:
        return {k: encode(v, f"{name}/{k}", tensors) for k, v in value.items()}
    items = [
        [encode(k, f"a key of {name}", {}), encode(v, f"{name}/{k}", tensors)]
        for k, v in value.items()
    ]
    return {"$counter" if type(value) is Counter else "$dict": items}
