"""A path for a FileStore: one that does not exist yet."""

import os
import tempfile


def scratch_path() -> str:
    handle, path = tempfile.mkstemp()
    os.close(handle)
    os.unlink(path)
    return path
