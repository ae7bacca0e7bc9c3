"""How the ranks are divided: shards of a copy of the model, and copies."""

import sys
from dataclasses import dataclass

from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True)
class ParallelDims:
    shards: int
    world_size: int

    @classmethod
    def of(cls, config, world_size):
        degree = config.data_parallel_shard_degree
        shards = degree or world_size
        if shards < 1 or world_size % shards:
            sys.exit(f"data_parallel_shard_degree {degree} does not divide {world_size} ranks")
        return cls(shards, world_size)

    def build_mesh(self):
        if self.shards == self.world_size:
            return init_device_mesh("cpu", (self.world_size,))
        copies = self.world_size // self.shards
        return init_device_mesh("cpu", (copies, self.shards), mesh_dim_names=("replicate", "shard"))

    def share_of(self, micro_batches):
        """How many of a step's micro-batches each rank plays."""
        if micro_batches % self.world_size:
            sys.exit(f"{micro_batches} micro-batches cannot be shared by {self.world_size} ranks")
        return micro_batches // self.world_size
