"""Numa: on which memory node an arena's pages lie. The choice is pure; the kernel is asked by ctypes.

A page lies where it is first touched, and an arena's pages are made by the agent, wherever that runs.
They belong beside the processor that fills them: the rank's, or the one that its GPU hangs on. A node
without processors (CXL memory) is taken only when it is named.
"""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ftkit.core.errors import UsageError

AUTO, OFF = "auto", "off"

_NODES = Path("/sys/devices/system/node")
_PCI = Path("/sys/bus/pci/devices")

#: mbind(2), which the C library does not wrap.
_MBIND = {"x86_64": 237, "aarch64": 235}

#: From this node while it has free memory, then from others. A strict policy would have the kernel
#: kill somebody instead.
_PREFERRED = 1

_NODES_MAX = 1024
_WORD = 8 * ctypes.sizeof(ctypes.c_ulong)


@dataclass(frozen=True, slots=True)
class MemoryNode:
    """A node that has memory."""

    number: int
    cpus: frozenset[int]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where memory is to lie, and why."""

    node: MemoryNode | None
    """None: wherever it is first touched."""
    reason: str


def check_setting(setting: str) -> None:
    """Raise UsageError unless it is "auto", "off" or a number."""
    if setting not in (AUTO, OFF) and not setting.isdecimal():
        raise UsageError(f"--numa is {setting!r}, not auto, off or the number of a node")


def choose(
    setting: str,
    nodes: Sequence[MemoryNode],
    *,
    cpus: Iterable[int] = (),
    gpu_node: int | None = None,
) -> Placement:
    """The node of one rank's arena.

    Args:
      setting: "auto", "off" or the number of a node.
      nodes: those of this machine that have memory.
      cpus: processors that the rank may run on.
      gpu_node: the node that its GPU hangs on, if it has one that says so.

    Raises:
      UsageError: no such setting, or no such node.
    """
    check_setting(setting)
    by_number = {node.number: node for node in nodes}
    if setting == OFF:
        return Placement(None, "it is off")
    if setting != AUTO:
        if int(setting) not in by_number:
            raise UsageError(
                f"--numa {setting}: this machine has memory on nodes {sorted(by_number)}; name one "
                "of them, or leave it to auto"
            )
        return Placement(by_number[int(setting)], "it was named")
    if len(nodes) < 2:
        return Placement(None, "there is one node")
    if gpu_node in by_number:
        return Placement(by_number[gpu_node], "the rank's GPU hangs on it")
    wanted = frozenset(cpus)
    for node in nodes:
        if wanted and wanted <= node.cpus:
            return Placement(node, "the rank's processors are on it")
    return Placement(None, "the rank may run on several nodes")


def memory_nodes(root: Path = _NODES) -> list[MemoryNode]:
    """The nodes of this machine that have memory; none where the kernel does not tell."""
    try:
        numbers = numbers_of((root / "has_memory").read_text())
        return [
            MemoryNode(n, frozenset(numbers_of((root / f"node{n}" / "cpulist").read_text())))
            for n in numbers
        ]
    except (OSError, ValueError):
        return []


def node_of_gpu(address: str, root: Path = _PCI) -> int | None:
    """The node of a PCI device such as "0000:3b:00.0"; None where nothing is known of it."""
    try:
        number = int((root / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return number if number >= 0 else None


def numbers_of(text: str) -> list[int]:
    """The kernel's lists: "0-2,5" is 0, 1, 2, 5. ValueError when it is none."""
    found = list[int]()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def prefer(address: int, count: int, node: int) -> str:
    """Have the pages of a mapping, which are still to come, lie on a node where it has room.

    Of shared memory all mappings of the file obey. `address` is that of a page.

    Returns:
      Why the kernel will not, or nothing.
    """
    number = _MBIND.get(platform.machine())
    if number is None:
        return f"on {platform.machine()} the number of mbind(2) is not known"
    mask = (ctypes.c_ulong * (_NODES_MAX // _WORD))()
    mask[node // _WORD] = 1 << node % _WORD
    libc = ctypes.CDLL(None, use_errno=True)
    refused = libc.syscall(
        ctypes.c_long(number), ctypes.c_void_p(address), ctypes.c_ulong(count),
        ctypes.c_int(_PREFERRED), mask, ctypes.c_ulong(_NODES_MAX + 1), ctypes.c_uint(0),
    )  # fmt: skip
    if not refused:
        return ""
    return f"the kernel refused mbind(2): {os.strerror(ctypes.get_errno())}"


@contextmanager
def touching_from(node: MemoryNode) -> Iterator[bool]:
    """Inside, this thread runs on the node's processors, so that what it touches first lies there.

    Yields whether that is so: a node may have no processors, or none that this process may use.
    """
    before = os.sched_getaffinity(0)
    there = before & node.cpus
    if there:
        os.sched_setaffinity(0, there)
    try:
        yield bool(there)
    finally:
        if there:
            with contextlib.suppress(OSError):  # the processors were taken away meanwhile
                os.sched_setaffinity(0, before)
