"""The text to train on: the source of Python's standard library, which is on every machine."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils import data


class Text(data.Dataset):
    """Windows of bytes, each with the window that begins one byte later."""

    def __init__(self, seq_len):
        files = sorted(Path(os.__file__).parent.glob("*.py"))
        source = bytearray().join(path.read_bytes() for path in files)
        self.bytes, self.seq_len = torch.frombuffer(source, dtype=torch.uint8), seq_len

    def __len__(self):
        return (len(self.bytes) - 1) // self.seq_len

    def __getitem__(self, index):
        window = self.bytes[index * self.seq_len :][: self.seq_len + 1].long()
        return window[:-1], window[1:]


def micro_batches(dataset, batch_size, start):
    """This rank's batches without end, in order, from the job's batch number `start` on."""
    count, number = len(dataset) // batch_size, start + dist.get_rank()
    while True:
        first = number % count * batch_size
        yield data.default_collate([dataset[first + i] for i in range(batch_size)])
        number += dist.get_world_size()
