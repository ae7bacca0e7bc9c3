"""`ftkit ui`: serve a run's page until Ctrl-C or SIGTERM; no file and no process is left."""

import errno
import secrets
import webbrowser
from collections.abc import Callable
from pathlib import Path

from ftkit.core.errors import UsageError
from ftkit.launch.sigterm import sigterm_as_ctrl_c
from ftkit.launch.ui.live_page import LivePage
from ftkit.launch.ui.server import UiServer, is_loopback

#: What a person can call the machine itself, where a server listens at all its addresses.
_EVERYWHERE = {"": "THIS-HOST", "0.0.0.0": "THIS-HOST", "::": "THIS-HOST"}


def serve(
    run_dir: Path, *, host: str, port: int, open_browser: bool, say: Callable[[str], None]
) -> int:
    """Serve until told to end. Blocks; returns the exit code.

    Args:
      run_dir: of the run, which may be going on or over.
      host: where to listen; anywhere but on this machine alone, a new token is asked for.
      port: the same; 0 takes any that is free.
      open_browser: show the page in this machine's browser.
      say: takes lines for the person who started it.

    Raises:
      UsageError: the address cannot be listened at.
    """
    token = "" if is_loopback(host) else secrets.token_urlsafe(24)
    try:
        server = UiServer(LivePage(run_dir).answer, host, port, token=token)
    except (OSError, OverflowError) as error:
        raise UsageError(_refused(host, port, error)) from error
    with server, sigterm_as_ctrl_c():
        shown = _EVERYWHERE.get(host, f"[{host}]" if ":" in host else host)
        url = f"http://{shown}:{server.server_address[1]}/" + (f"?token={token}" if token else "")
        say(f"ftkit: {run_dir} is shown at {url} (Ctrl-C ends this; the job goes on)")
        if token:
            say("ftkit: whoever has this address may look; it is not encrypted on its way")
        if open_browser and not webbrowser.open(url):
            say("ftkit: no browser was found on this machine; open the address yourself")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            pass
    return 0


def _refused(host: str, port: int, error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    match number:
        case errno.EADDRINUSE:
            return (
                f"port {port} of {host} is taken, perhaps by another `ftkit ui`; give --port "
                "another number, or 0 for any that is free"
            )
        case errno.EACCES:
            return f"port {port} is for the administrator; give --port a number from 1024 on"
        case errno.EADDRNOTAVAIL:
            return f"{host} is no address of this machine; give --host one of its own"
        case _:
            return f"cannot listen at {host}:{port}: {error}; see --host and --port"
