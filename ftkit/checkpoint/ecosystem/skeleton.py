"""Skeleton: a state dict as JSON in which each tensor is a name (pure, no torch).

It is what `plain.encode` makes of a state dict: it keeps tuples, integer keys and non-finite
numbers, and says {"$tensor": name} where a tensor belongs. A checkpoint that was written from a
state dict keeps it in its small state, under "state_dict".

Names join the keys with "/" ("model/0.weight"), as those of a training job's state do; foreign
formats join them with "." ("model.0.weight").
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ftkit.core.errors import IntegrityError, UsageError

#: Where the small state keeps it.
STATE_DICT = "state_dict"


def reference(name: str) -> dict[str, str]:
    """What stands in place of a tensor."""
    return {"$tensor": name}


def renamed(value: Any, new: Callable[[str], str]) -> Any:
    """The same skeleton with every tensor's name put through `new`."""
    match value:
        case {"$tensor": str(name)}:
            return reference(new(name))
        case dict():
            return {key: renamed(v, new) for key, v in value.items()}
        case list():
            return [renamed(v, new) for v in value]
        case _:
            return value


def tensor_names(value: Any) -> Iterator[str]:
    """The tensors' names, in order of appearance."""
    match value:
        case {"$tensor": str(name)}:
            yield name
        case dict():
            for v in value.values():
                yield from tensor_names(v)
        case list():
            for v in value:
                yield from tensor_names(v)


def taken(skeleton: Mapping[str, Any], part: str) -> tuple[dict[str, Any], dict[str, str]]:
    """One part of a state dict by itself, as a model's file holds it.

    Args:
      skeleton: of the whole.
      part: a key of its top level, "model" for one.

    Returns:
      The part's skeleton, with the part no longer in names, and the name each tensor had before.

    Raises:
      UsageError: there is no such part, or it is no dict; says which there are.
    """
    inner = skeleton.get(part)
    if not isinstance(inner, dict) or any(key.startswith("$") for key in inner):
        raise UsageError(
            f"there is no part {part!r} that is a dict; the state has {', '.join(sorted(skeleton))}"
        )
    before = {name.removeprefix(f"{part}/"): name for name in tensor_names(inner)}
    return renamed(inner, lambda name: name.removeprefix(f"{part}/")), before


def checked(skeleton: Any, names: Iterable[str]) -> dict[str, Any]:
    """A skeleton that was read back, when it is one of exactly these tensors.

    Raises:
      IntegrityError: it is no dict, or names other tensors than there are.
    """
    if not isinstance(skeleton, dict) or any(key.startswith("$") for key in skeleton):
        raise IntegrityError("the stored state dict is no dict of named values")
    wanted, there = set(tensor_names(skeleton)), set(names)
    if wanted != there:
        odd = sorted(wanted ^ there)
        raise IntegrityError(
            f"the stored state dict and the tensors disagree about {len(odd)} names: {odd[:5]}"
        )
    return skeleton


def of_checkpoint(names: Iterable[str], small: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that a checkpoint holds, in the form that torch's users know.

    Args:
      names: the checkpoint's tensors.
      small: its small state. One with "state_dict" was written from a state dict; one with that
        of a seat under the seat's number is a training job's (`ProtectedState`): the lowest
        seat's values are given, and optimizer state in the form of
        `torch.distributed.checkpoint.state_dict`, keyed by parameter names. Of any other the
        tensors' names alone are told apart, at their first "/".

    Raises:
      IntegrityError: the small state names tensors that are not there.
    """
    found = sorted(names)
    if STATE_DICT in small:
        return checked(small[STATE_DICT], found)
    seats = [key for key in small if key.isdecimal()]
    job = small[min(seats, key=int)] if seats else None
    if isinstance(job, Mapping) and isinstance(job.get("optimizers"), Mapping):
        return checked(_of_job(found, job), found)
    return _split(found)


def _split(names: list[str]) -> dict[str, Any]:
    heads = {name.partition("/")[0] for name in names if "/" in name}
    if heads & set(names) or any(name.startswith("$") for name in names):
        return {f"tensor/{name}": reference(name) for name in names}
    nested = dict[str, Any]()
    for name in names:
        head, slash, rest = name.partition("/")
        if not slash:
            nested[name] = reference(name)
        elif rest.startswith("$"):
            return {f"tensor/{n}": reference(n) for n in names}
        else:
            nested.setdefault(head, {})[rest] = reference(name)
    return nested


def _of_job(names: list[str], small: Mapping[str, Any]) -> dict[str, Any]:
    optimizers: Mapping[str, Any] = small["optimizers"]
    others: Mapping[str, Any] = small.get("others", {})
    modules = [n for n in names if n.partition("/")[0] not in optimizers.keys() | others.keys()]
    nested = _split(modules)
    for optimizer, kept in optimizers.items():
        nested[optimizer] = _optimizer(optimizer, kept, names)
    nested |= dict(others)
    # What only another seat's values refer to is kept by its name.
    nested |= {f"tensor/{n}": reference(n) for n in set(names) - set(tensor_names(nested))}
    return nested


def _optimizer(optimizer: str, kept: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """One optimizer's state as `get_optimizer_state_dict` of torch gives it."""
    prefix = f"{optimizer}/state/"
    try:
        groups: list[Any] = kept["groups"]
        members = [p for group in groups for p in group["params"]]
        owners = {str(p).partition("/")[0] for p in members}

        def bare(parameter: str) -> str:
            # torch knows parameters by their name in the one model; ours say which module.
            return parameter.partition("/")[2] if len(owners) == 1 else parameter

        state = dict[str, dict[str, Any]]()
        for name in names:
            if name.startswith(prefix):
                parameter, _, key = name.removeprefix(prefix).rpartition("/")
                state.setdefault(bare(parameter), {})[key] = reference(name)
        for parameter, rest in kept.get("other", {}).items():
            state.setdefault(bare(parameter), {}).update(rest)
        return {
            "state": state,
            "param_groups": [
                dict(group["hyper"]) | {"params": [bare(str(p)) for p in group["params"]]}
                for group in groups
            ],
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise IntegrityError(f"the small state of {optimizer} is not a job's: {error!r}") from error
