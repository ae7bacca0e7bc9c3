"""A training loop in the shape of torchtitan's; plain.py and elastic.py differ by what ftkit asks for.

The plain one runs under torchrun and `ftkit run`, the other under `ftkit run`:

    ftkit run --nproc 3 examples/pretrain/elastic.py examples/pretrain/job.toml --training.steps=100
"""

import logging

import ftkit
import torch
from config import JobConfig
from hooks import MetricsProcessor
from model import Transformer, parallelize, warm_up_then_cosine
from text import Text
from torch import nn


class Trainer:
    def __init__(self, config):
        self.config, training = config, config.training
        self.session = ftkit.init()
        self.dataset = Text(training.seq_len)
        self.tokens_per_step = training.global_batch_size * training.seq_len
        self.slots = training.global_batch_size // training.local_batch_size
        shards = config.parallelism.data_parallel_shard_degree or None
        self.session.protect(build=self.build, shards=shards, device="cpu")
        self.metrics = MetricsProcessor(config.metrics, self)

    def build(self, mesh):
        config = self.config
        torch.manual_seed(0)
        self.model = parallelize(Transformer(config.model, config.training.seq_len), mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **vars(config.optimizer))
        self.lr_scheduler = warm_up_then_cosine(
            self.optimizer, config.lr_scheduler.warmup_steps, config.training.steps
        )
        return self.model, self.optimizer, self.lr_scheduler

    def forward_backward_step(self, tokens, labels):
        logits = self.model(tokens)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = loss / self.tokens_per_step
        loss.backward()
        return loss.detach()

    def train_step(self, step):
        self.optimizer.zero_grad()
        for batch in step.batches():
            step.record(self.forward_backward_step(*batch))
        self.grad_norm = step.clip_grad_norm_(self.config.training.max_norm)
        self.optimizer.step()
        self.lr_scheduler.step()

    def train(self):
        training = self.config.training
        for step in self.session.steps(
            self.dataset,
            slots=self.slots,
            slot_size=training.local_batch_size,
            until=training.steps,
            shuffle=False,
            mean=False,
        ):
            with step:
                self.train_step(step)
            if step.committed:
                self.metrics.log(step.index, step.loss)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", level="INFO")
    Trainer(JobConfig.from_arguments()).train()
