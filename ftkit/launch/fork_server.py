"""The fork server: a process that has imported torch, and forks a node's ranks from itself.

Importing torch and what DDP and FSDP import at their first use takes seconds of a core, in every
process anew: it is most of the time in which a replacement cannot train yet, and the survivors
beside it feel it. Here it is paid for once a node. ::

    agent ---- program, environment, output ----> fork server
      ^                                              | fork
      |                                            middle     (ends at once)
      |                                              | fork
      +-------- is the parent of --------------------+-> rank

The agent is a *subreaper* (prctl(2)), so a rank becomes the agent's own child when the process in
the middle ends: it is waited for, and dies with its agent, as if the agent had started it. It
asks the agent itself before it runs anything, so that one that comes too late runs nothing. The
end of the fork server touches no rank.

Nothing here may start a thread or touch a GPU: neither survives a fork. `unfit` looks.
"""

import gc
import importlib
import json
import os
import re
import runpy
import signal
import socket
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from ftkit.core import exit_codes
from ftkit.launch.ranks import die_with

#: What training scripts import, or torch imports for them at the first DDP, DTensor or optimizer.
PRELOAD = (
    "torch",
    "torch.distributed",
    "torch.distributed.tensor",
    "torch.nn.parallel",
    "torch._dynamo",
    "ftkit.session.start",
    "ftkit.session.plain",
)

#: Of a message; environments are limited to far less by the kernel.
MESSAGE_BYTES_MAX = 64 << 20

#: The leash, over which a rank asks whether it is still wanted, and its output.
FDS_MAX = 2

PID_BYTES = 4
_LENGTH_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What a rank runs, as this interpreter would be told on its command line."""

    name: str
    """A file, or with `is_module` the name of a module."""
    is_module: bool
    arguments: tuple[str, ...]

    @classmethod
    def of(cls, command: Sequence[str]) -> "Program | None":
        """The program of `PYTHON -u FILE ...` or `PYTHON -u -m MODULE ...`; None for others."""
        match command:
            case [sys.executable, "-u", "-m", name, *arguments]:
                return cls(name=name, is_module=True, arguments=tuple(arguments))
            case [sys.executable, "-u", name, *arguments] if not name.startswith("-"):
                return cls(name=name, is_module=False, arguments=tuple(arguments))
            case _:
                return None

    @property
    def command(self) -> list[str]:
        """The command line it is `of`."""
        what = ["-m", self.name] if self.is_module else [self.name]
        return [sys.executable, "-u", *what, *self.arguments]

    def frameworks(self) -> list[str]:
        """The integrations that the program names: what they import takes longer than torch."""
        if self.is_module:
            return []
        try:
            text = Path(self.name).read_bytes()
        except OSError:
            return []  # the rank will say so
        found = {name.decode() for name in re.findall(rb"ftkit\.integrations\.[a-z_]+", text)}
        return sorted(found)

    def run(self) -> None:
        """Be that program, in this process, as far as it can tell. Raises what it raises."""
        if not sys.flags.safe_path:
            # Python follows the link to a script, too: what it imports lies beside the file.
            here = os.getcwd() if self.is_module else os.path.dirname(os.path.realpath(self.name))
            if hidden(here):
                os.execv(sys.executable, self.command)  # what it would have been
            sys.path.insert(0, here)
        sys.argv = [self.name, *self.arguments]
        if self.is_module:
            runpy.run_module(self.name, run_name="__main__", alter_sys=True)
            return
        main = types.ModuleType("__main__")
        main.__file__ = self.name
        main.__builtins__ = __builtins__  # type: ignore[attr-defined]  # as for any __main__
        sys.modules["__main__"] = main
        with open(self.name, "rb") as file:
            code = compile(file.read(), self.name, "exec", dont_inherit=True)
        exec(code, main.__dict__)  # noqa: S102  # what Python itself does with a script


def main(argv: Sequence[str]) -> None:
    """Import, say so, and fork until the agent hangs up; in a rank, run its program.

    Args:
      argv: the channel's file descriptor, the agent's process number, and further modules to
        import.
    """
    channel = socket.socket(fileno=int(argv[0]))
    agent = int(argv[1])
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not sys.flags.safe_path:
        # This file's own folder. Each rank puts its program's there.
        del sys.path[0]
    for name in (*PRELOAD, *argv[2:]):
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # another version of torch; what is missing is only not preloaded
    reason = unfit()
    send(channel, {"unfit": reason})
    if reason:
        return
    # What is here stays: a rank's garbage collection should not write to, and so copy, its pages.
    gc.collect()
    gc.freeze()
    program = serve(channel, agent)
    if program is not None:
        signal.signal(signal.SIGINT, interrupt)
        _prepare()
        program.run()


def _prepare() -> None:
    """(in the rank) Watch over a script that knows nothing of ftkit."""
    plain = sys.modules.get("ftkit.session.plain")
    if plain is not None:
        plain.prepare(os.environ)


def hidden(folder: str) -> list[str]:
    """Modules in `folder` that cannot be imported: other modules of their names were before."""
    found = list[str]()
    for name, module in list(sys.modules.items()):
        spec = None if "." in name else PathFinder.find_spec(name, [folder])
        if spec is not None and spec.loader is not None:  # else a folder, which hides nothing
            file = getattr(module, "__file__", None)
            if not file or not os.path.samefile(str(spec.origin), file):
                found.append(name)
    return found


def unfit() -> str:
    """Why this process may not be forked; empty when it may."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        return f"importing torch started {threads - 1} threads"
    cuda = sys.modules["torch"].cuda if "torch" in sys.modules else None
    if cuda is not None and cuda.is_initialized():
        return "importing torch initialized CUDA"
    return ""


def serve(channel: socket.socket, agent: int) -> Program | None:
    """Fork a rank for every order. Returns None at the end, and in each rank its program."""
    while (order := receive(channel)) is not None:
        message, fds = order
        middle = os.fork()
        if middle == 0:
            here = os.getpid()
            if os.fork():
                os._exit(0)
            channel.close()
            _become_rank(message, fds, agent=agent, middle=here)
            program = message["program"]
            return Program(**{**program, "arguments": tuple(program["arguments"])})
        os.waitpid(middle, 0)
        for fd in fds:
            os.close(fd)
    return None


def _become_rank(message: dict[str, Any], fds: Sequence[int], *, agent: int, middle: int) -> None:
    """(in the rank) Be the agent's child, ask it whether to go on, leave the fork server behind."""
    os.setsid()
    while os.getppid() == middle:
        os.sched_yield()
    die_with(agent)
    leash, *outputs = fds
    with socket.socket(fileno=leash) as ask:
        ask.sendall(os.getpid().to_bytes(PID_BYTES, "big"))
        if not ask.recv(1):
            os._exit(exit_codes.AGENT_GONE)  # it has given up on us, and started another
    for output in outputs:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
    os.chdir(message["cwd"])
    os.environ.clear()
    os.environ.update(message["env"])
    # `random` draws a seed of its own after a fork; numpy does not.
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()


def send(channel: socket.socket, message: object, fds: Sequence[int] = ()) -> None:
    """Send one JSON value, and copies of file descriptors with it. Blocks."""
    data = json.dumps(message).encode()
    socket.send_fds(channel, [len(data).to_bytes(_LENGTH_BYTES, "big")], list(fds))
    channel.sendall(data)


def receive(channel: socket.socket) -> tuple[Any, list[int]] | None:
    """What `send` sent, or None when the other end has hung up. Blocks.

    Raises:
      ConnectionError: it hung up in the middle, or the length makes no sense.
    """
    head, fds, _, _ = socket.recv_fds(channel, _LENGTH_BYTES, FDS_MAX)
    if not head:
        return None
    head += _exactly(channel, _LENGTH_BYTES - len(head))
    size = int.from_bytes(head, "big")
    if size > MESSAGE_BYTES_MAX:
        raise ConnectionError(f"a message of {size} bytes, more than {MESSAGE_BYTES_MAX}")
    return json.loads(_exactly(channel, size)), fds


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = channel.recv(size - len(data))
        if not piece:
            raise ConnectionError(f"hung up after {len(data)} of {size} bytes")
        data += piece
    return bytes(data)


if __name__ == "__main__":
    main(sys.argv[1:])
