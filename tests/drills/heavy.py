"""A rank that holds half a gigabyte and is killed, once."""

import os
import signal

import ftkit

session = ftkit.init()
ballast = bytearray(b"x") * (512 << 20)
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    os.kill(os.getpid(), signal.SIGKILL)
