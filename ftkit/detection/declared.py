"""Declared: whether what came as JSON is what the fields of a dataclass say it is. Pure.

Ranks send signals that nobody reads before the coordinator does: of what a peer says nothing is
taken on trust, for one value of another type would end whoever reckons with it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, Final, NewType, Union, cast, get_args, get_origin, get_type_hints

#: Numbers beyond this are none that anybody counts with.
_INT_MAX: Final = 1 << 63


def checked(
    kind: type, values: Mapping[str, object], *, unbounded: frozenset[str] = frozenset()
) -> dict[str, object]:
    """The fields, integers turned into floats where a float is declared.

    Args:
      kind: a dataclass of ints, floats, strings, booleans, mappings from strings and sequences.
      values: the fields, as they came.
      unbounded: names of floats that may be infinite or NaN.

    Raises:
      ValueError: a field is of another type, a number out of range, or not declared.
    """
    readers = _readers(kind, unbounded)
    found: dict[str, object] = {}
    for name, value in values.items():
        reader = readers.get(name)
        if reader is None:
            raise ValueError(f"{name} is no field of {kind.__name__}")
        found[name] = reader(value, name)
    return found


def whole(value: object) -> int:
    """`value` as an integer that the rows and records of any host can hold.

    Raises:
      ValueError, TypeError, OverflowError: it is none.
    """
    if type(value) is int and -_INT_MAX <= value <= _INT_MAX:
        return value
    number = int(value)  # type: ignore[call-overload]
    if abs(number) > _INT_MAX:
        raise ValueError(
            f"an integer of {number.bit_length()} bits is none that anybody counts with"
        )
    return int(number)


#: Takes a value and the name of its field, and gives what it is as declared.
_Reader = Callable[[object, str], object]


@cache
def _readers(kind: type, unbounded: frozenset[str]) -> dict[str, _Reader]:
    """A reader for each field: made once, for a large job's signals come by the ten thousand."""
    hints = get_type_hints(kind)
    return {f.name: _reader(hints[f.name], finite=f.name not in unbounded) for f in fields(kind)}


def _reader(hint: Any, *, finite: bool) -> _Reader:
    while isinstance(hint, NewType):
        hint = hint.__supertype__
    if hint is object:
        return lambda value, name: value
    if get_origin(hint) in (UnionType, Union):
        (some,) = (h for h in get_args(hint) if h is not NoneType)
        of = _reader(some, finite=finite)
        return lambda value, name: None if value is None else of(value, name)
    if hint is float:
        return _finite if finite else _float
    if simple := {int: _int, str: _str, bool: _bool}.get(hint):
        return simple
    if get_origin(hint) is Mapping:
        return partial(_mapping, _reader(get_args(hint)[1], finite=finite))
    if get_origin(hint) in (Sequence, tuple):
        return partial(_list, _reader(get_args(hint)[0], finite=finite))
    raise TypeError(f"no value of type {hint} can be read")


def _int(value: object, name: str) -> object:
    if type(value) is int and -_INT_MAX < value < _INT_MAX:
        return value
    raise _wrong(value, name, "an integer")


def _float(value: object, name: str) -> object:
    if type(value) is float:
        return value
    return float(cast("int", _int(value, name)))


def _finite(value: object, name: str) -> object:
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is int and -_INT_MAX < value < _INT_MAX:
        return float(value)
    raise _wrong(value, name, "a finite number")


def _str(value: object, name: str) -> object:
    if type(value) is str:
        return value
    raise _wrong(value, name, "a string")


def _bool(value: object, name: str) -> object:
    if type(value) is bool:
        return value
    raise _wrong(value, name, "true or false")


def _mapping(of: _Reader, value: object, name: str) -> object:
    if isinstance(value, dict):
        return {str(key): of(item, name) for key, item in value.items()}
    raise _wrong(value, name, "an object")


def _list(of: _Reader, value: object, name: str) -> object:
    if isinstance(value, list | tuple):
        return [of(item, name) for item in value]
    raise _wrong(value, name, "a list")


def _wrong(value: object, name: str, what: str) -> ValueError:
    return ValueError(f"{name} is {value!r}, must be {what}")
