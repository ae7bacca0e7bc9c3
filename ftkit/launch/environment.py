"""The environment of a rank: torchrun's variables, and ftkit's own."""

import os
from collections.abc import Mapping
from pathlib import Path

from ftkit.core.rank_env import RankEnv
from ftkit.launch.config import JobConfig
from ftkit.recovery.plan import Assignment


def rank_environment(
    config: JobConfig,
    seat: Assignment,
    *,
    agent: str,
    secret: str,
    host: str,
    shm_dir: Path,
    restarts: int,
    inherited: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """Everything a rank finds in its environment.

    Args:
      config: the job.
      seat: the seat to fill and the member that fills it.
      agent: path of the agent's socket.
      secret: the job's secret in hexadecimal.
      host: address this node is reached at.
      shm_dir: the node's folder of shared memory.
      restarts: processes this job has replaced so far.
      inherited: what the rank inherits beneath all that.
    """
    node, local = divmod(seat.seat, config.places)
    # As a job without spares counts them; those come after.
    rank = node * config.nproc + local
    if local >= config.nproc:
        rank = config.seats + node * config.spares + local - config.nproc
    torchrun = {
        "RANK": rank,
        "LOCAL_RANK": local,
        "WORLD_SIZE": config.seats,
        "LOCAL_WORLD_SIZE": config.nproc,
        "GROUP_RANK": node,
        "GROUP_WORLD_SIZE": config.nodes,
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": config.seats,
        "ROLE_NAME": "default",
        "MASTER_ADDR": config.env.get("MASTER_ADDR", host),
        "MASTER_PORT": config.master_port,
        "TORCHELASTIC_RUN_ID": config.job,
        "TORCHELASTIC_RESTART_COUNT": restarts,
        "TORCHELASTIC_MAX_RESTARTS": config.restarts_max,
        "TORCHELASTIC_USE_AGENT_STORE": False,
    }
    own = RankEnv(
        job=config.job,
        seat=seat.seat,
        member=seat.member,
        node=seat.node,
        seats=config.seats,
        agent=agent,
        secret=secret,
        host=host,
        run_dir=config.run_dir,
        shm_dir=str(shm_dir),
        local_seat=local,
        max_stall_s=config.max_stall_s,
        checkpoint_dir=config.checkpoint_dir,
        # Else it comes with the plan.
        checkpoint_every=config.checkpoint_every if isinstance(config.checkpoint_every, int) else 0,
    )
    return {
        **common_environment(config, inherited=inherited),
        **{k: str(v) for k, v in torchrun.items()},
        **own.to_environ(),
        **({} if config.record else {"FTKIT_RECORD": "0"}),
        **config.env,
    }


def common_environment(
    config: JobConfig, *, inherited: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """What all ranks of a node find alike: what modules see when they are imported for them."""
    # One thread a rank, as torchrun does: several ranks share the cores.
    threads = {"OMP_NUM_THREADS": inherited.get("OMP_NUM_THREADS", "1")}
    return {**inherited, **threads, **config.env}
