"""Identity: who a process group says it is. Rank and size follow the world through each edit.

torch asks for the same thing under several names, from C++ (trampolines) and from Python.
"""

# torch.distributed has a NewType for names, which nobody who is given one needs.
# mypy: disable-error-code="override"

import torch
import torch.distributed as dist

from ftkit.collectives.channel import Channel

BACKEND = "ftkit"


class Identity(dist.ProcessGroup):
    """The part of a process group that answers questions and moves nothing."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel.rank, channel.size)  # type: ignore[call-arg]
        self.channel = channel
        self._name = self._desc = "undefined"

    def size(self) -> int:
        return self.channel.size

    def rank(self) -> int:
        return self.channel.rank

    def getSize(self) -> int:  # noqa: N802 - torch's name
        return self.channel.size

    def getRank(self) -> int:  # noqa: N802
        return self.channel.rank

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    def name(self) -> str:
        return BACKEND

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802
        self._name = name

    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> str:
        return self._name

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._desc

    def setGroupDesc(self, desc: str) -> None:  # noqa: N802
        self._desc = desc

    def _set_group_desc(self, desc: str) -> None:
        self._desc = desc

    @property
    def group_desc(self) -> str:
        return self._desc

    @property
    def _device_types(self) -> list[torch.device]:
        # torch's object collectives take the first.
        devices = [torch.device("cpu")]
        return [*devices, torch.device("cuda")] if torch.cuda.is_available() else devices

    def _has_hooks(self) -> bool:
        return False

    def _wait_for_pending_works(self) -> None:
        """Nothing to wait for: hooks do not exist here."""

    def _set_sequence_number_for_group(self) -> None:
        """Numbers begin at 0 in each generation by themselves."""
