"""The NVML governor against a driver that is made up: what it asks, and what it says of errors."""

import sys
from types import ModuleType
from typing import Any

import pytest

from ftkit.launch.nvml_clocks import NvmlClocks
from ftkit.recovery.clocks import ClockGovernor, ClockRange


class Driver(ModuleType):
    """What NVML offers of clocks, for one GPU."""

    NVML_CLOCK_SM = 1

    class NVMLError(Exception): ...

    class NVMLError_NoPermission(NVMLError): ...  # noqa: N801  # its name in NVML

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.locked: tuple[int, int] | None = None
        self.root = True

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index:
            raise self.NVMLError("Not Found")
        return "gpu"

    def nvmlDeviceGetSupportedMemoryClocks(self, gpu: str) -> list[int]:
        return [1593, 2619]

    def nvmlDeviceGetSupportedGraphicsClocks(self, gpu: str, memory: int) -> list[int]:
        assert memory == 2619
        return [1980, 1965, 345]

    def nvmlDeviceGetClockInfo(self, gpu: str, kind: int) -> int:
        return 210  # idle: below what can be locked

    def nvmlDeviceSetGpuLockedClocks(self, gpu: str, low: int, high: int) -> None:
        if not self.root:
            raise self.NVMLError_NoPermission("Insufficient Permissions")
        self.locked = (low, high)

    def nvmlDeviceResetGpuLockedClocks(self, gpu: str) -> None:
        self.locked = None


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", made)
    return made


def test_a_clock_is_held_and_let_go(driver: Driver) -> None:
    clocks: ClockGovernor = NvmlClocks(0)
    assert clocks.range() == ClockRange(now=345, lowest=345, highest=1980)
    clocks.lock(1500)
    assert driver.locked == (1500, 1500)
    clocks.release()
    assert driver.locked is None


def test_what_the_driver_refuses_is_said(driver: Driver) -> None:
    driver.root = False
    with pytest.raises(PermissionError, match="takes root"):
        NvmlClocks(0).lock(1500)
    with pytest.raises(OSError, match="cannot find the GPU: Not Found"):
        NvmlClocks(1)


def test_without_bindings_it_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(OSError, match="nvidia-ml-py"):
        NvmlClocks(0)
