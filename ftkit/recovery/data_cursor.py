"""Which samples and which randomness a slot holds: a pure function of (seed, step, slot).

There is no cursor to save, lose or double: after `step` committed steps exactly the first
`step * slots * slot_size` places of the sample stream are consumed, whoever computed them.
The stream runs through the data set epoch after epoch; within an epoch every sample comes
once, in an order that a keyed permutation (a Feistel network with cycle walking) gives
without a table.
"""

import hashlib
from dataclasses import dataclass

from ftkit.core.ids import Slot, Step

_ROUNDS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCursor:
    """The sample stream of one job.

    Steps count from 1, as committed steps do: step t reads the places from
    (t - 1) * slots * slot_size on.
    """

    length: int
    """Samples in the data set."""
    slots: int
    """Slots of the global batch; fixed for the job, whatever the world size."""
    slot_size: int
    """Samples in a slot."""
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError("the data set is empty: there is nothing to train on")
        if self.slots < 1 or self.slot_size < 1:
            raise ValueError(
                f"slots and slot_size count from 1, got slots={self.slots}, "
                f"slot_size={self.slot_size}"
            )

    def samples(self, step: Step, slot: Slot) -> list[int]:
        """Indices into the data set of the samples that `slot` holds at `step`."""
        if not 0 <= slot < self.slots or step < 1:
            raise ValueError(f"no slot {slot} at step {step}: slots are 0..{self.slots - 1}")
        start = ((step - 1) * self.slots + slot) * self.slot_size
        return [self.sample(place) for place in range(start, start + self.slot_size)]

    def sample(self, place: int) -> int:
        """The sample at one place of the stream."""
        epoch, position = divmod(place, self.length)
        if not self.shuffle:
            return position
        return permute(position, self.length, key=derive(self.seed, "epoch", epoch))

    def epoch(self, step: Step) -> float:
        """Epochs consumed once `step` is committed."""
        return step * self.slots * self.slot_size / self.length


def rng_key(seed: int, step: Step, slot: Slot) -> int:
    """A 63-bit seed for everything random in this slot, the same on any rank."""
    return derive(seed, "slot", step, slot) >> 1


def derive(*parts: object) -> int:
    """A 64-bit key from `parts`: equal parts give equal keys, any difference another."""
    data = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def permute(position: int, length: int, *, key: int) -> int:
    """The image of `position` under a permutation of range(length) chosen by `key`.

    A balanced Feistel network over the smallest even number of bits that holds `length`,
    walked until the result falls inside: fewer than four walks on average.
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for i in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ (key >> (i * 7)) ^ (i << 40)) & mask)
        value = (left << half) | right
        if value < length:
            return value


def _mix(x: int) -> int:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
