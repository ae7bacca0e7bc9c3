"""SaveProfile: where the time of a checkpoint went."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields

from ftkit.core.clock import Clock


@dataclass(slots=True)
class SaveProfile:
    """Seconds of the writing thread, and bytes. Of several writers: their sums."""

    codec_s: float = 0.0
    """Compression, checksums, and copies of chunks that are no single run of memory."""
    write_s: float = 0.0
    """Handing bytes to the store, and waiting where too many were on their way."""
    fsync_s: float = 0.0
    """Waiting, after the last write, until everything was durable."""
    commit_s: float = 0.0
    """Checking the fragments, the manifest and the commit record."""
    tensor_bytes: int = 0
    """Bytes of the tensors."""
    stored_bytes: int = 0
    """Bytes of the files that hold them."""
    files: int = 0

    @contextmanager
    def timing(self, part: str, clock: Clock) -> Iterator[None]:
        """Add the time of a block to `<part>_s`."""
        start = clock.now()
        try:
            yield
        finally:
            name = f"{part}_s"
            setattr(self, name, getattr(self, name) + clock.now() - start)

    def to_json(self) -> dict[str, float | int]:
        return asdict(self)

    @classmethod
    def of_json(cls, value: Mapping[str, object]) -> "SaveProfile":
        """Read `to_json`. TypeError when it is something else."""
        if not all(isinstance(number, int | float) for number in value.values()):
            raise TypeError("a profile holds numbers alone")
        return cls(**value)  # type: ignore[arg-type]  # just checked

    @classmethod
    def total(cls, profiles: Iterable["SaveProfile"]) -> "SaveProfile":
        """The sums over several writers; pure."""
        found = list(profiles)
        return cls(**{f.name: sum(getattr(p, f.name) for p in found) for f in fields(cls)})
