"""The job's configuration: a TOML file, of which `--section.key=value` changes single values."""

import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT = Path(__file__).with_name("job.toml")


@dataclass(kw_only=True)
class Model:
    dim: int = 32
    layers: int = 2
    heads: int = 4
    vocab: int = 256


@dataclass(kw_only=True)
class Optimizer:
    lr: float = 3e-3
    weight_decay: float = 0.1


@dataclass(kw_only=True)
class LRScheduler:
    warmup_steps: int = 20


@dataclass(kw_only=True)
class Training:
    steps: int = 200
    seq_len: int = 64
    local_batch_size: int = 2
    global_batch_size: int = 12
    max_norm: float = 1.0


@dataclass(kw_only=True)
class Parallelism:
    data_parallel_shard_degree: int = 0


@dataclass(kw_only=True)
class Metrics:
    log_freq: int = 10
    file: str = ""


@dataclass(kw_only=True)
class Checkpoint:
    folder: str = ""
    interval: int = 100


@dataclass(kw_only=True)
class JobConfig:
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    parallelism: Parallelism = field(default_factory=Parallelism)
    metrics: Metrics = field(default_factory=Metrics)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)

    @classmethod
    def from_arguments(cls):
        """Read this script's arguments: `[JOB.toml] --section.key=value ...`."""
        files = [a for a in sys.argv[1:] if not a.startswith("--")] or [DEFAULT]
        tables = tomllib.loads(Path(files[0]).read_text(encoding="utf-8"))
        for change in (a for a in sys.argv[1:] if a.startswith("--")):
            path, _, value = change.removeprefix("--").partition("=")
            section, _, key = path.partition(".")
            tables.setdefault(section, {})[key] = value
        config = cls()
        for section, values in tables.items():
            if section not in vars(config):
                sys.exit(f"there is no section {section}; there are {', '.join(vars(config))}")
            part = getattr(config, section)
            for key, value in values.items():
                if key not in vars(part):
                    sys.exit(f"[{section}] has no {key}; it has {', '.join(vars(part))}")
                setattr(part, key, type(getattr(part, key))(value))
        return config
