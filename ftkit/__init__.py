"""ftkit: fault tolerance for distributed PyTorch training.

Importing this package imports neither torch nor Ray; the names below are looked up on
first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftkit.core.errors import FtkitError as FtkitError
    from ftkit.core.errors import JobFault as JobFault
    from ftkit.core.errors import UsageError as UsageError
    from ftkit.session import Session as Session
    from ftkit.session import init as init
    from ftkit.session.zero import ZeroOptimizer as ZeroOptimizer

__version__ = "0.1.0"

_WHERE = {
    "init": "ftkit.session",
    "Session": "ftkit.session",
    "ZeroOptimizer": "ftkit.session.zero",
    "FtkitError": "ftkit.core.errors",
    "JobFault": "ftkit.core.errors",
    "UsageError": "ftkit.core.errors",
}

__all__ = ["FtkitError", "JobFault", "Session", "UsageError", "ZeroOptimizer", "init"]


def __getattr__(name: str) -> object:
    try:
        return getattr(import_module(_WHERE[name]), name)
    except KeyError:
        raise AttributeError(f"module 'ftkit' has no attribute {name!r}") from None
