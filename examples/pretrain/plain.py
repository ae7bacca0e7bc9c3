"""A training loop in the shape of torchtitan's; plain.py and elastic.py differ by what ftkit asks for.

The plain one runs under torchrun and `ftkit run`, the other under `ftkit run`:

    ftkit run --nproc 3 examples/pretrain/elastic.py examples/pretrain/job.toml --training.steps=100
"""

import itertools
import logging

import torch
from config import JobConfig
from hooks import CheckpointManager, MetricsProcessor, dist_sum
from model import Transformer, clip_grad_norm_, parallelize, warm_up_then_cosine
from parallel_dims import ParallelDims
from text import Text, micro_batches
from torch import nn


class Trainer:
    def __init__(self, config):
        self.config, training = config, config.training
        torch.distributed.init_process_group("gloo")
        parallel_dims = ParallelDims.of(config.parallelism, torch.distributed.get_world_size())
        self.dataset = Text(training.seq_len)
        self.tokens_per_step = training.global_batch_size * training.seq_len
        self.slots = training.global_batch_size // training.local_batch_size
        self.gradient_accumulation_steps = parallel_dims.share_of(self.slots)
        self.build(parallel_dims.build_mesh())
        self.checkpointer = CheckpointManager(config.checkpoint, self)
        self.metrics = MetricsProcessor(config.metrics, self)

    def build(self, mesh):
        config = self.config
        torch.manual_seed(0)
        self.model = parallelize(Transformer(config.model, config.training.seq_len), mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **vars(config.optimizer))
        self.lr_scheduler = warm_up_then_cosine(
            self.optimizer, config.lr_scheduler.warmup_steps, config.training.steps
        )

    def forward_backward_step(self, tokens, labels):
        logits = self.model(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = loss / self.tokens_per_step
        loss.backward()
        return loss.detach()

    def train_step(self, data_iterator):
        self.optimizer.zero_grad()
        loss = 0.0
        for batch in itertools.islice(data_iterator, self.gradient_accumulation_steps):
            loss += self.forward_backward_step(*batch)
        self.grad_norm = clip_grad_norm_(self.model, self.config.training.max_norm)
        self.optimizer.step()
        self.lr_scheduler.step()
        return dist_sum(loss)

    def train(self):
        training = self.config.training
        done = self.checkpointer.load()
        batches = micro_batches(self.dataset, training.local_batch_size, done * self.slots)
        for step in range(done + 1, training.steps + 1):
            self.metrics.log(step, self.train_step(batches))
            self.checkpointer.save(step)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level="INFO")
    Trainer(JobConfig.from_arguments()).train()
