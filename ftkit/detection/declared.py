"""Declared: whether what came as JSON is what the fields of a dataclass say it is. Pure.

Ranks send signals that nobody reads before the coordinator does: of what a peer says nothing is
taken on trust, for one value of another type would end whoever reckons with it.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, Final, NewType, Union, get_args, get_origin, get_type_hints

#: Numbers beyond this are none that anybody counts with.
_INT_MAX: Final = 1 << 63


def checked(
    kind: type, fields: Mapping[str, object], *, unbounded: frozenset[str] = frozenset()
) -> dict[str, object]:
    """The fields, integers turned into floats where a float is declared.

    Args:
      kind: a dataclass of ints, floats, strings, booleans, mappings from strings and sequences.
      fields: as they came.
      unbounded: names of floats that may be infinite or NaN.

    Raises:
      ValueError: a field is of another type, a number out of range, or not declared.
    """
    hints = _hints(kind)
    found: dict[str, object] = {}
    for name, value in fields.items():
        if name not in hints:
            raise ValueError(f"{name} is no field of {kind.__name__}")
        found[name] = _as(hints[name], value, name, finite=name not in unbounded)
    return found


def whole(value: object) -> int:
    """`value` as an integer that the rows and records of any host can hold.

    Raises:
      ValueError, TypeError, OverflowError: it is none.
    """
    number = int(value)  # type: ignore[call-overload]
    if abs(number) > _INT_MAX:
        raise ValueError(
            f"an integer of {number.bit_length()} bits is none that anybody counts with"
        )
    return int(number)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _as(hint: Any, value: object, name: str, *, finite: bool) -> object:
    while isinstance(hint, NewType):
        hint = hint.__supertype__
    if hint is object:
        return value
    if get_origin(hint) in (UnionType, Union):
        if value is None and NoneType in get_args(hint):
            return None
        (hint,) = (h for h in get_args(hint) if h is not NoneType)
        return _as(hint, value, name, finite=finite)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        if abs(value) < _INT_MAX:
            return value
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) and abs(value) >= _INT_MAX:
            raise ValueError(f"{name} is out of range")
        if math.isfinite(value) or not finite:
            return float(value)
    elif hint in (str, bool) and isinstance(value, hint):
        return value
    elif get_origin(hint) is Mapping and isinstance(value, Mapping):
        of = get_args(hint)[1]
        return {str(k): _as(of, v, name, finite=finite) for k, v in value.items()}
    elif get_origin(hint) in (Sequence, tuple) and isinstance(value, list | tuple):
        of = get_args(hint)[0]
        return [_as(of, v, name, finite=finite) for v in value]
    raise ValueError(f"{name} is {value!r}, must be {hint}")
