"""NvmlClocks: a `ClockGovernor` for one NVIDIA GPU, through NVML where its bindings are installed.

Locking the SM clock (`nvmlDeviceSetGpuLockedClocks`, Volta and later) needs root, or a driver that was
told to let others do it; it lasts until it is released, whatever becomes of this process, so
`release` belongs into a `finally`. `session.steps(..., clocks=NvmlClocks(index))` raises it while ranks
are away.
"""

from typing import Any

from ftkit.recovery.clocks import ClockRange


class NvmlClocks:
    """One GPU's SM clock. Calls go to the driver and take some milliseconds."""

    def __init__(self, index: int) -> None:
        """The GPU with NVML's number `index`.

        Raises:
          OSError: there are no bindings (`pip install nvidia-ml-py`), or no such GPU.
        """
        try:
            import pynvml
        except ImportError as error:
            raise OSError("NVML's bindings are not installed: pip install nvidia-ml-py") from error
        self._nvml: Any = pynvml
        with self._told("find"):
            self._nvml.nvmlInit()
            self._gpu = self._nvml.nvmlDeviceGetHandleByIndex(index)

    def range(self) -> ClockRange:
        """What it runs at, and what it supports at its highest memory clock."""
        nvml = self._nvml
        with self._told("read the clocks of"):
            memory = max(nvml.nvmlDeviceGetSupportedMemoryClocks(self._gpu))
            steps = nvml.nvmlDeviceGetSupportedGraphicsClocks(self._gpu, memory)
            now = nvml.nvmlDeviceGetClockInfo(self._gpu, nvml.NVML_CLOCK_SM)
        low, high = min(steps), max(steps)
        return ClockRange(now=min(max(now, low), high), lowest=low, highest=high)

    def lock(self, mhz: int) -> None:
        """Hold the SM clock at `mhz`, or at the nearest step the driver knows."""
        with self._told("lock the clock of"):
            self._nvml.nvmlDeviceSetGpuLockedClocks(self._gpu, mhz, mhz)

    def release(self) -> None:
        with self._told("release the clock of"):
            self._nvml.nvmlDeviceResetGpuLockedClocks(self._gpu)

    def _told(self, what: str) -> "_Told":
        return _Told(self._nvml, what)


class _Told:
    """Turns NVML's errors into ours, with what was tried."""

    def __init__(self, nvml: Any, what: str) -> None:
        self._nvml, self._what = nvml, what

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if not isinstance(error, self._nvml.NVMLError):
            return
        text = f"cannot {self._what} the GPU: {error}"
        denied = getattr(self._nvml, "NVMLError_NoPermission", ())
        if denied and isinstance(error, denied):
            raise PermissionError(f"{text}; it takes root") from error
        raise OSError(text) from error
