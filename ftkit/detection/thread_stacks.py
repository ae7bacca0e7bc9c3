"""ThreadStacks: what every thread of a rank is doing, told by the rank itself, by name.

Frames of threads that run may only be walked by who holds the interpreter lock: then none of
them moves. So a thread of the rank's own does it when asked, over a datagram socket in its node's
shared memory; until then it sleeps in the kernel and costs nothing. A rank that keeps the lock
does not answer, and of one that is stopped nobody asks: of those there is what `stacks` shows.
"""

import logging
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final

from ftkit.core.ids import MemberId

logger = logging.getLogger(__name__)

#: Of all threads together, as much as a person reads; it has to fit into one datagram.
BYTES_MAX: Final = 64 << 10
#: Frames of one thread, innermost first: recursion must not crowd the others out.
FRAMES_MAX: Final = 64
_NAME: Final = "ftkit-stacks"


def path(folder: Path, member: MemberId) -> Path:
    """The socket at which `member` is asked."""
    return folder / f"threads-{member}.sock"


@contextmanager
def answering(folder: Path, member: MemberId) -> Iterator[None]:
    """(in the rank) Answer while this lasts. Where no socket can be made, nobody answers."""
    where = path(folder, member)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        thread = threading.Thread(target=_answer, args=(sock,), name=_NAME, daemon=True)
        try:
            where.unlink(missing_ok=True)
            sock.bind(str(where))
            thread.start()
        except (OSError, RuntimeError) as error:
            logger.debug("stacks of all threads cannot be asked for at %s: %s", where, error)
        try:
            yield
        finally:
            if thread.ident is not None:
                sock.shutdown(socket.SHUT_RDWR)  # wakes the thread
                thread.join(timeout=1.0)
            where.unlink(missing_ok=True)


def ask(folder: Path, member: MemberId, *, limit_s: float = 0.5) -> str:
    """The stacks of all its threads; "" when it does not answer within `limit_s`. Blocks for that.

    What it answers later goes nowhere: each question has a socket of its own.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(limit_s)
        try:
            sock.bind("")  # a name of the kernel's choice, to be answered at
            sock.connect(str(path(folder, member)))
            sock.send(b"?")
            return sock.recv(BYTES_MAX).decode(errors="replace")
        except OSError:
            return ""  # it has ended, keeps the interpreter, or never listened


def current() -> str:
    """The stacks of this process's threads, the main one first, in faulthandler's form.

    The calling thread is left out. Each is as it was at one moment; between two of them others
    may have run.
    """
    names = {t.ident: t.name for t in threading.enumerate()}
    main, mine = threading.main_thread().ident, threading.get_ident()
    frames = sys._current_frames()
    try:
        order = sorted(frames, key=lambda ident: (ident != main, names.get(ident, "~")))
        told = [
            # One that Python did not start has no name.
            f"{'Main thread' if ident == main else 'Thread'} 0x{ident:016x} "
            f'"{names.get(ident, "?")}" (most recent call first):\n' + _frames(frames[ident])
            for ident in order
            if ident != mine
        ]
    finally:
        del frames  # our own frame is in it, and tensors of others' live as long as theirs
    return "\n".join(told)


def _frames(frame: FrameType | None) -> str:
    lines: list[str] = []
    while frame is not None and len(lines) < FRAMES_MAX:
        code = frame.f_code
        lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}\n')
        frame = frame.f_back
    return "".join(lines) + ("" if frame is None else "  ...\n")


def _answer(sock: socket.socket) -> None:
    while True:
        try:
            question, who = sock.recvfrom(16)
            if not question:
                return  # it is shut down
            sock.sendto(current().encode()[:BYTES_MAX], who)
        except ConnectionError:
            continue  # whoever asked has given up
        except OSError as error:
            logger.debug("stacks of all threads are no longer told: %s", error)
            return
