"""Logs: what ftkit's own processes say to people, on standard error."""

import logging


def log_to_stderr(*, quiet: bool = False) -> None:
    """Show warnings and errors of ftkit on standard error; with `quiet`, errors alone."""
    logging.basicConfig(format="ftkit %(name)s: %(message)s")
    # Said of our own loggers, so that it holds where somebody else (Ray) has set up logging.
    logging.getLogger("ftkit").setLevel(logging.ERROR if quiet else logging.WARNING)
