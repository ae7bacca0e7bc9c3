"""FtkitConfig and its backend: Ray Train's controller starts agents and a coordinator.

Ray Train places workers and replaces those that die; each hosts an agent (`ray_train_worker`). The
coordinator is an actor beside the controller, kept alive from here. As long as Ray Train's group of
workers lives, its run is one job of ftkit; where Ray Train starts the whole group anew, of whatever
size, another job goes on from the checkpoints of the one before.
"""

import contextlib
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import exceptions as ray_errors
from ray.train.backend import Backend, BackendConfig
from ray.train.torch import TorchConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftkit.checkpoint.stripes import Code
from ftkit.core.errors import UsageError
from ftkit.launch import ray_train_rank, ray_train_worker
from ftkit.launch.config import JobConfig, Times, new_job_id, new_secret
from ftkit.launch.coordinator_tries import CoordinatorTries
from ftkit.launch.disk import give_back, refuse_or_take
from ftkit.launch.ray_actors import CoordinatorHost
from ftkit.launch.ray_engine import NOTICE_S, draining_nodes
from ftkit.recovery.plan import Stop

logger = logging.getLogger(__name__)

#: For a worker that still lives to end its agent.
STOP_S = 10.0
#: What TorchConfig holds that means something else here, or nothing.
_FOREIGN = ("ftkit", "env", 1800)


@dataclass(kw_only=True)
class FtkitConfig(TorchConfig):
    """`TorchTrainer(in_ranks(train), torch_config=FtkitConfig(nproc=2), ...)`."""

    nproc: int = 1
    """Ranks of each worker, which books resources for all of them."""
    spares: int = 0
    """Further ranks of each worker, kept warm."""
    max_stall_s: float = 30.0
    """How long a rank may keep the others waiting; a worker of which nothing is heard, twice that."""
    parity: str = ""
    """k+m: any m workers of a group of k + m may vanish together."""
    parity_every: float | str = 0
    """Seconds between the begins of two rounds of parity, at least; "auto" for as often as pays."""
    checkpoint_dir: str = ""
    """Where checkpoints go, and where a group of workers that is started anew goes on from; empty: the
    folder `ftkit` of the run in Ray Train's storage, if that is a folder which all workers share."""
    checkpoint_every: int | str = 0
    """Steps between two checkpoints; 0 for the one at the end alone, "auto" for as often as pays."""
    run_dir: str = ""
    """Each job writes its events into a folder of its name there; empty: a temporary directory."""
    shm_root: str = "/dev/shm"

    def __post_init__(self) -> None:
        if (self.backend or "ftkit", self.init_method, self.timeout_s) != _FOREIGN:
            raise UsageError(
                "FtkitConfig takes no backend, init_method or timeout_s: ftkit.init() makes the "
                "process group in each rank, and max_stall_s is what waits"
            )
        self.backend = "ftkit"  # else TorchTrainer would choose gloo or nccl
        if self.checkpoint_dir and "://" not in self.checkpoint_dir:
            self.checkpoint_dir = str(Path(self.checkpoint_dir).resolve())
        if self.run_dir:
            self.run_dir = str(Path(self.run_dir).resolve())
        # What makes no sense is said in the driver, not in an actor's log. How many workers there
        # will be is not known here, so not whether they suffice for the parity.
        code = Code.parse(self.parity)
        Times.derive(self.max_stall_s)
        self.job(nodes=sum(code) if code else 1)

    @property
    def backend_cls(self) -> type[Backend]:
        return FtkitBackend

    @property
    def train_func_context(self) -> type[contextlib.AbstractContextManager[None]]:
        # Workers train nothing and leave the accelerators to their ranks.
        return contextlib.nullcontext

    def job(self, *, nodes: int) -> JobConfig:
        """A new job on so many workers.

        Raises:
          UsageError: a setting makes no sense, or contradicts another one, or the workers are too
            few for the parity.
        """
        name = new_job_id()
        root = Path(self.run_dir or Path(tempfile.gettempdir(), "ftkit-runs"))
        return JobConfig(
            job=name,
            command=(sys.executable, "-u", "-m", ray_train_rank.__name__),
            nodes=nodes,
            nproc=self.nproc,
            spares=self.spares,
            parity=self.parity,
            parity_every=self.parity_every,
            max_stall_s=self.max_stall_s,
            run_dir=str(root / name),
            shm_root=self.shm_root,
            checkpoint_dir=self.checkpoint_dir,
            checkpoint_every=self.checkpoint_every,
        )


class FtkitBackend(Backend):
    """(controller) Starts a job for a group of workers, and agents for those that are replaced.

    Ray Train's word for a worker that it may replace alone is a replica group of size one.
    """

    has_replica_groups = True

    def __init__(self) -> None:
        self._run: JobRun | None = None

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, FtkitConfig), "whose backend this is"
        if is_replacement(worker_group):
            assert self._run is not None, "what is replaced was started"
            self._run.replace(worker_group)
            return
        run = JobRun(backend_config.job(nodes=len(worker_group)), worker_group)
        try:
            run.start()
        except BaseException:
            run.close()
            raise
        self._run = run

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        if is_replacement(worker_group):
            tell(worker_group, ray_train_worker.stop_agent)
        elif self._run is not None:
            self._run.close()
            self._run = None


class JobRun:
    """The job of one group of workers. The controller calls; a thread keeps a coordinator."""

    def __init__(self, config: JobConfig, workers: Any) -> None:
        """Prepare.

        Args:
          config: the job; each worker is a node of it.
          workers: Ray Train's group of them, which replaces its members.
        """
        self._config = config
        self._workers = workers
        self._secret = new_secret()
        self._addresses: dict[int, tuple[str, int]] = {}
        self._lock = threading.Lock()
        self._actor: Any = None
        self._closing = False
        self._stop: Stop | None = None
        self._thread = threading.Thread(target=self._lead, name="ftkit-coordinator", daemon=True)

    def start(self) -> None:
        """Start an agent in every worker, then the coordinator.

        Raises:
          RootInUse: another job writes its checkpoints there.
          UsageError: the checkpoint directory cannot be used.
        """
        config = self._config
        Path(config.run_dir, "events").mkdir(parents=True)
        places = self._workers.execute(ray_train_worker.place)
        if not config.checkpoint_dir:
            config = replace(config, checkpoint_dir=self._in_storage({p.storage for p in places}))
        config = refuse_or_take(config)
        first = min(places, key=lambda p: p.node)
        env = {"MASTER_ADDR": first.host}
        self._config = replace(config, env=env, master_port=first.port)
        self._start_agents(self._workers)
        logger.info(
            "ftkit job %s: %s workers of %s ranks each; its events are in %s",
            config.job,
            config.nodes,
            config.nproc,
            config.run_dir,
        )
        self._thread.start()

    def replace(self, group: Any) -> None:
        """A worker is a new one: its agent joins the job, if that still runs.

        Where no agent can be started, the worker's function says so and it is replaced again: what
        is raised here would end the whole run.
        """
        if self._stop is None:
            before = dict(self._addresses)
            try:
                self._start_agents(group)
            except ray_errors.RayError as error:
                logger.warning("a new worker has no agent: %s", error)
                return
            with self._lock:
                if self._addresses != before and self._actor is not None:
                    # Coordinators are told the addresses once; the next one will know this one.
                    ray.kill(self._actor)
        if (stop := self._stop) is not None:
            # Also when it ended meanwhile: nobody else would tell this worker.
            tell(group, ray_train_worker.job_over, stop.code, stop.reason)

    def close(self) -> None:
        """End the job in order where it has not ended: with a last checkpoint, if there are any."""
        with self._lock:
            self._closing = True
            actor = self._actor
        if actor is not None and self._stop is None:
            actor.interrupt.remote("Ray Train ends its group of workers")
            self._thread.join(self._config.interrupt_s)
        tell(self._workers, ray_train_worker.stop_agent)
        if actor is not None:
            ray.kill(actor)
        give_back(self._config)

    def _in_storage(self, storages: set[str]) -> str:
        """A folder for checkpoints in the run's storage, as the workers name it; empty if they cannot."""
        (storage, *others) = storages
        if storage and not others:
            root = Path(storage, "ftkit")
            mark = root / f".{self._config.job}"
            try:
                root.mkdir(exist_ok=True)
                mark.touch()
                shared = all(self._workers.execute(ray_train_worker.sees, str(mark)))
                mark.unlink()
            except OSError as error:
                logger.debug("no checkpoints in Ray Train's storage: %s", error)
            else:
                if shared:
                    return str(root)
        logger.warning(
            "a group of workers that is started anew, to resize it too, begins at step 0: Ray Train's "
            "storage is no folder that all workers share. Give FtkitConfig a checkpoint_dir"
        )
        return ""

    def _start_agents(self, group: Any) -> None:
        calls = []
        for index, place in enumerate(group.execute(ray_train_worker.place)):
            # The port of the agent before, if it is free, so that the coordinator may stay.
            known = self._addresses.get(place.node)
            calls.append(
                group.execute_single_async(
                    index,
                    ray_train_worker.start_agent,
                    self._config.to_json(),
                    self._secret,
                    place.host,
                    known[1] if known is not None else 0,
                    sys.executable,
                )
            )
        self._addresses |= dict(ray.get(calls))

    def _lead(self) -> None:
        """(thread) Have a coordinator as long as the job runs; tell the workers of notices and its end."""
        number, tries = 0, CoordinatorTries()
        while self._stop is None:
            number += 1
            with self._lock:
                if self._closing:
                    return
                actor = self._actor = _coordinator()
            addresses = [self._addresses[node] for node in sorted(self._addresses)]
            began = time.monotonic()
            try:
                run = actor.run.remote(self._config.to_json(), self._secret, addresses, number)
                while not ray.wait([run], timeout=NOTICE_S)[0]:
                    self._pass_on_notices()
                code, reason = ray.get(run)
                self._stop = Stop(code=code, reason=reason)
            except ray_errors.RayActorError:
                logger.warning("coordinator %s is gone; starting another", number)
                ray.kill(actor)  # or out of reach only
                continue
            except Exception as error:  # noqa: BLE001 - nobody else would hear of it
                # It will come again: a full disk, a bug.
                cause = error.cause if isinstance(error, ray_errors.RayTaskError) else error
                logger.warning("coordinator %s ended by an error: %r", number, cause)
                ray.kill(actor)
                lived_s = time.monotonic() - began
                self._stop = tries.ended(lived_s=lived_s, error=repr(cause))
        # Those whose agents the coordinator never reached would wait for it.
        tell(self._workers, ray_train_worker.job_over, self._stop.code, self._stop.reason)

    def _pass_on_notices(self) -> None:
        """Tell workers whose machines Ray is about to take away, for as long as it is."""
        # Ray Train passes no notices on to backends that replace workers.
        if draining := draining_nodes():
            try:
                workers = self._workers.get_workers()
            except ValueError as error:
                logger.debug("the group of workers is gone: %s", error)
                return
            for worker in workers:
                if worker.metadata.node_id in draining:
                    worker.execute_async(ray_train_worker.drain_agent)


def is_replacement(group: Any) -> bool:
    """Whether Ray Train means one worker that it replaces, not the whole group."""
    return not hasattr(group, "get_replica_groups")


def tell(group: Any, function: Callable[..., object], *arguments: object) -> None:
    """Have those of a group's workers that still live call `function`. Blocks for `STOP_S` at most."""
    try:
        calls = group.execute_async(function, *arguments)
    except ValueError as error:
        logger.debug("the group of workers is gone: %s", error)
        return
    ray.wait(calls, num_returns=len(calls), timeout=STOP_S)


def _coordinator() -> Any:
    """An actor for one, on this machine, which ends with this process."""
    here = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(CoordinatorHost)
        .options(
            num_cpus=0,
            max_concurrency=4,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote()
    )
