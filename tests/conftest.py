"""What holds for every test: Hypothesis' settings, and one thread to a process that computes.

How long an example takes speaks of the machine, not of what is tested. And sums in another number
of threads have other bits: a test and the processes that it starts compute in one thread each,
whichever test ran before, as ranks of a job do.
"""

import os

from hypothesis import HealthCheck, settings

os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch

settings.register_profile("ftkit", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ftkit")
