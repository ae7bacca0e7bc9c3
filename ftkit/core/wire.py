"""Authenticated sockets and small JSON messages: how ftkit's processes talk.

Every connection, on a Unix socket or TCP, begins with a mutual challenge: each side proves
that it holds the job's secret by an HMAC-SHA256 over both nonces and its role, so neither
a replay nor a reflection is accepted. After it, the data plane speaks its own binary frames
(`collectives.frames`); the control plane speaks messages: a 4-byte length and a JSON
object. Sizes are checked before anything is allocated, and nothing is ever unpickled.
"""

import hashlib
import hmac
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ftkit.core.errors import AuthenticationError, ProtocolError, WireError

MAGIC = b"ftkit/1\n"
#: The greeting of those who hold no secret of a job but a key to one thing of it.
VISITOR = b"ftkit/v\n"
NONCE_BYTES = 32
PROOF_BYTES = 32
HELLO_BYTES_MAX = 4096
MESSAGE_BYTES_MAX = 16 << 20
_LENGTH = struct.Struct("!I")
_TIMEVAL = struct.Struct("@ll")
#: A peer that reads nothing for this long, with its buffers full, is not worth waiting for.
SEND_S = 5


def authenticate(
    sock: socket.socket,
    secret: bytes,
    *,
    server: bool,
    hello: Mapping[str, object] | None = None,
    timeout_s: float = 10.0,
    visitor: bool = False,
) -> dict[str, Any]:
    """Prove to the peer that we hold `secret`, have it prove the same, and swap hellos.

    Blocks for at most `timeout_s`. The socket is left in blocking mode without timeout.

    Args:
      sock: connected stream socket; stays the caller's, and is not closed here on error.
      secret: the job's secret.
      server: whether this side accepted the connection. The two sides must differ.
      hello: JSON-safe facts to tell the peer once it is trusted (who we are).
      timeout_s: the longest all of it may take.
      visitor: whether `secret` is a visitor's key, as the peer's `admit` knows it.

    Returns:
      The peer's hello.

    Raises:
      AuthenticationError: the peer does not hold the secret.
      ProtocolError: the peer speaks something else.
      WireError: the connection broke, or the peer was not through after `timeout_s`.
    """
    greeting = VISITOR if visitor else MAGIC
    return _greet(sock, {greeting: secret}, greeting, server, hello, timeout_s)[1]


def admit(
    sock: socket.socket,
    secret: bytes,
    *,
    visitors: bytes | None = None,
    hello: Mapping[str, object] | None = None,
    timeout_s: float = 10.0,
) -> tuple[bool, dict[str, Any]]:
    """As `authenticate` of a server, for visitors too, who hold another key.

    `visitors` is their key; None lets none of them in. All else is as in `authenticate`.

    Returns:
      Whether the peer is a visitor, which its hello cannot say otherwise; and its hello.

    Raises:
      AuthenticationError, ProtocolError, WireError: as `authenticate`.
    """
    secrets = {MAGIC: secret} | ({} if visitors is None else {VISITOR: visitors})
    greeting, said = _greet(sock, secrets, MAGIC, True, hello, timeout_s)
    return greeting == VISITOR, said


def _greet(
    sock: socket.socket,
    secrets: Mapping[bytes, bytes],
    greeting: bytes,
    server: bool,
    hello: Mapping[str, object] | None,
    timeout_s: float,
) -> tuple[bytes, dict[str, Any]]:
    """Greet with `greeting`; be greeted with one that has a secret. Returns that, and the hello."""
    mine, theirs = (b"server", b"client") if server else (b"client", b"server")
    until = time.monotonic() + timeout_s
    sock.settimeout(timeout_s)
    try:
        nonce = os.urandom(NONCE_BYTES)
        sock.sendall(greeting + nonce)
        opening = _read(sock, len(MAGIC) + NONCE_BYTES, until)
        greeted, other = opening[: len(MAGIC)], opening[len(MAGIC) :]
        if not server and greeted == MAGIC:
            greeted = greeting  # servers greet all alike
        if greeted not in secrets:
            if greeted == VISITOR:
                raise AuthenticationError("no visitors are let in here")
            raise ProtocolError(f"peer opened with {greeted!r}, not ftkit's greeting")
        secret = secrets[greeted]
        if other == nonce:
            raise AuthenticationError("peer reflected our own challenge")
        sock.sendall(_proof(secret, mine, nonce, other))
        proof = _read(sock, PROOF_BYTES, until)
        if not hmac.compare_digest(proof, _proof(secret, theirs, other, nonce)):
            raise AuthenticationError("peer does not hold this job's secret")
        send_message(sock, dict(hello or {}))
        return greeted, _receive(sock, HELLO_BYTES_MAX, until)
    except TimeoutError as error:
        raise WireError(f"the greeting took the peer more than {timeout_s} s") from error
    except OSError as error:
        raise WireError(f"connection broke during the greeting: {error}") from error
    finally:
        # Best effort: a socket that broke may already refuse options.
        try:
            sock.settimeout(None)
        except OSError:
            pass


def send_message(sock: socket.socket, message: Mapping[str, object]) -> None:
    """Send one message. Blocks until the kernel has it; OSError when it cannot."""
    sock.sendall(encode(message))


def encode(message: Mapping[str, object]) -> bytes:
    """A message as it goes over the wire: for one that many are sent. ValueError: too large."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MESSAGE_BYTES_MAX:
        raise ValueError(f"message of {len(data)} bytes exceeds {MESSAGE_BYTES_MAX}")
    return _LENGTH.pack(len(data)) + data


def receive_message(sock: socket.socket, *, bytes_max: int = MESSAGE_BYTES_MAX) -> dict[str, Any]:
    """Receive one message, blocking. Raises WireError at the end of the stream."""
    return _receive(sock, bytes_max)


def _receive(sock: socket.socket, bytes_max: int, until: float | None = None) -> dict[str, Any]:
    (length,) = _LENGTH.unpack(_read(sock, _LENGTH.size, until))
    if length > bytes_max:
        raise ProtocolError(f"message announces {length} bytes, at most {bytes_max} are allowed")
    try:
        message = json.loads(_read(sock, length, until))
    except (ValueError, RecursionError) as error:
        # A few kilobytes of "[" exhaust the parser's stack.
        raise ProtocolError(f"message is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"message is a {type(message).__name__}, not an object")
    return message


class Line:
    """A control connection that many threads may send on and one thread receives from."""

    def __init__(self, sock: socket.socket, hello: Mapping[str, Any] | None = None) -> None:
        """Take over `sock`, already authenticated; `hello` is what the peer said of itself."""
        self._sock = sock
        self._lock = threading.Lock()
        if sock.family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(SEND_S, 0))
        self.hello: Mapping[str, Any] = hello or {}

    def fileno(self) -> int:
        """The descriptor, for a selector."""
        return self._sock.fileno()

    def send(self, message: Mapping[str, object] | bytes) -> None:
        """Send one message, which may be `encode`d already. Blocks for at most `SEND_S`.

        Raises:
          WireError: the peer is gone, or has not read for that long. The connection is closed
            then: a message that was cut short leaves nothing to go on with.
        """
        try:
            with self._lock:
                self._sock.sendall(message if isinstance(message, bytes) else encode(message))
        except OSError as error:
            self.close()
            raise WireError(f"peer is gone: {error}") from error

    def answer_within(self, seconds: float) -> None:
        """From now on `receive` waits so long for each read, and then takes the peer for gone."""
        limit = _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)

    def receive(self) -> dict[str, Any]:
        """Receive one message, blocking. Raises WireError when the peer is gone."""
        try:
            return receive_message(self._sock)
        except OSError as error:
            raise WireError(f"peer is gone: {error}") from error

    def close(self) -> None:
        """Wake a blocked `receive` and close. May be called from any thread, twice."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster
        self._sock.close()


def listen(host: str, port: int = 0) -> socket.socket:
    """A listening TCP socket on `host`. Raises OSError, the port being taken among others."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(128)
    except OSError:
        sock.close()
        raise
    return sock


def listen_unix(path: str) -> socket.socket:
    """A listening Unix socket at `path`, readable by this user only."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(128)
    except OSError:
        sock.close()
        raise
    return sock


def connect(
    address: tuple[str, int] | str,
    secret: bytes,
    *,
    hello: Mapping[str, object],
    timeout_s: float = 10.0,
    dial: Callable[[tuple[str, int], float], socket.socket] | None = None,
    visitor: bool = False,
) -> Line:
    """Connect to a TCP (host, port) or a Unix socket path, authenticate, and say who we are.

    `dial`: opens the connection to a (host, port) in another way (`detour`). `visitor`: as in
    `authenticate`.

    Raises:
      WireError: nobody listens there, or the greeting failed.
    """
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    if isinstance(address, tuple) and ":" in address[0]:
        family = socket.AF_INET6
    sock = socket.socket(family)
    try:
        sock.settimeout(timeout_s)
        if dial is not None and isinstance(address, tuple):
            sock.close()
            sock = dial(address, timeout_s)
        else:
            sock.connect(address)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        said = authenticate(
            sock, secret, server=False, hello=hello, timeout_s=timeout_s, visitor=visitor
        )
        return Line(sock, said)
    except OSError as error:
        sock.close()
        raise WireError(f"cannot reach {address}: {error}") from error
    except WireError:
        sock.close()
        raise


def _proof(secret: bytes, role: bytes, own: bytes, other: bytes) -> bytes:
    return hmac.new(secret, role + own + other, hashlib.sha256).digest()


def _read(sock: socket.socket, count: int, until: float | None = None) -> bytes:
    """So many bytes. TimeoutError when they have not come by `until`, however they drip."""
    data = bytearray()
    while len(data) < count:
        if until is not None:
            sock.settimeout(max(until - time.monotonic(), 1e-3))
        chunk = sock.recv(count - len(data))
        if not chunk:
            raise WireError(f"connection ended after {len(data)} of {count} bytes")
        data += chunk
    return bytes(data)
