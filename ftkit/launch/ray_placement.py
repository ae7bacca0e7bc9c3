"""What a job books on a Ray cluster: a bundle for each agent, and what to say when there is no room. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ftkit.core.errors import UsageError

#: Share of a CPU that Ray books for an agent: a bundle may not be empty, and ranks are
#: wanted even where Ray counts fewer CPUs than there are ranks.
AGENT_CPUS: Final = 0.01

#: By what `--placement` says. The first is none of Ray's.
AUTO_PLACEMENT: Final = "auto"
STRATEGIES: Final = {
    "spread": "SPREAD",
    "strict-spread": "STRICT_SPREAD",
    "pack": "PACK",
}

#: As Ray has it of a machine, from `ray.nodes()`.
Machine = Mapping[str, Any]


def parse_resources(text: str) -> dict[str, float]:
    """What `--resources` says a node books: GPU=8,TPU-head=1.

    Raises:
      UsageError: it says something else.
    """
    found = dict[str, float]()
    for item in filter(None, text.split(",")):
        name, equals, amount = (part.strip() for part in item.partition("="))
        try:
            value = float(amount)
        except ValueError:
            value = math.nan
        if not (name and equals and math.isfinite(value) and value > 0) or name in found:
            raise UsageError(
                f"--resources has {item!r}, which is no NAME=AMOUNT of its own; write it as in "
                "GPU=8,fast-network=1"
            )
        found[name] = value
    return found


def bundle(
    alive: Sequence[Machine], *, nodes: int, nproc: int, wanted: Mapping[str, float] = {}
) -> dict[str, float]:
    """What each agent books: what is wanted, else a GPU for each rank where enough machines have them."""
    if wanted:
        return {"CPU": AGENT_CPUS, **wanted}
    fitting = sum(int(n["Resources"].get("GPU", 0)) // nproc for n in alive)
    return {"CPU": AGENT_CPUS, **({"GPU": nproc} if fitting >= nodes else {})}


def strategy(placement: str, *, nodes: int, alive: int) -> str:
    """Ray's name for it. Agents by themselves are spread, strictly where there are machines for it."""
    if placement != AUTO_PLACEMENT:
        return STRATEGIES[placement]
    return "STRICT_SPREAD" if alive >= nodes > 1 else "SPREAD"


def shortage(alive: Sequence[Machine], shape: Mapping[str, float], *, nodes: int, how: str) -> str:
    """Why so many bundles fit into no cluster of these machines, however idle; "" where they may."""
    for name, amount in shape.items():
        most = max((float(n["Resources"].get(name, 0.0)) for n in alive), default=0.0)
        if not most:
            return f"no machine of the cluster has {name}: they have {_names(alive)}"
        if most < amount:
            return f"no machine of the cluster has {amount:g} {name}: the most of one is {most:g}"
    fits = [
        int(min(n["Resources"].get(name, 0.0) / amount for name, amount in shape.items()))
        for n in alive
    ]
    room = sum(min(f, 1) if how == "STRICT_SPREAD" else f for f in fits)
    if room >= nodes:
        return ""
    apart = ", each on a machine of its own" if how == "STRICT_SPREAD" else ""
    return f"the cluster has room for {room} of {nodes} nodes of {show(shape)}{apart}"


def show(shape: Mapping[str, float]) -> str:
    """As `--resources` takes it."""
    return ",".join(f"{name}={amount:g}" for name, amount in shape.items())


def _names(alive: Sequence[Machine]) -> str:
    # What Ray makes up itself, one for each machine, helps nobody.
    names = {name for n in alive for name in n["Resources"]}
    return ", ".join(sorted(n for n in names if not n.startswith(("node:", "object_store"))))
