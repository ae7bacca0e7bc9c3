"""JobPreflight: doctor's checks on every node of a job, before its ranks start.

Each agent runs them in a process of its own. Nodes of one machine share a result: the checks load it
for some seconds, and would only find each other. Results stay in RUN_DIR/preflight, one file a node.
"""

import fcntl
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ftkit.core.errors import ProtocolError
from ftkit.core.ids import NodeId
from ftkit.detection.node_health import Check, Health, NodeResult, against_peers, complaints
from ftkit.launch.config import JobConfig
from ftkit.launch.whole_file import write_whole

logger = logging.getLogger(__name__)

#: Folder of a run.
FOLDER = "preflight"
#: The checks take some seconds, most of them to import torch.
LIMIT_S = 180.0
#: What a failed check does to the job.
STOP, WARN = "stop", "warn"


class JobPreflight:
    """An agent's part. Owns one thread; `result` is None until it is through."""

    def __init__(
        self,
        config: JobConfig,
        node: NodeId,
        *,
        changed: Callable[[], None],
        command: Sequence[str] = (sys.executable, "-m", "ftkit.launch.preflight"),
    ) -> None:
        """Begin to check this node; `changed` is called on the thread when it is done."""
        self._config, self._node, self._changed = config, node, changed
        self._command = [*command, config.run_dir, config.shm_root]
        self._process: subprocess.Popen[str] | None = None
        self._closed = False
        self.result: dict[str, object] | None = None
        self._thread = threading.Thread(target=self._run, name="ftkit-preflight", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End what runs. Safe to call twice."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()

    def _run(self) -> None:
        host = socket.gethostname()
        try:
            found = self._shared(host)
        except (OSError, ValueError, ProtocolError, subprocess.TimeoutExpired) as error:
            logger.debug("the checks did not end well: %s", error)
            note = f"the checks gave no result: {str(error) or type(error).__name__}"
            check = Check(name="preflight", health=Health.FAILED, note=note)
            found = NodeResult(node=host, at=time.time(), checks=(check,))
        if self._closed:
            return
        self.result = found.to_json()
        self._changed()

    def _shared(self, host: str) -> NodeResult:
        """The result of this machine: another agent's, or our own."""
        folder = Path(self._config.run_dir) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{host}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = folder / f".{host}.json"
            if not path.exists():
                write_whole(path, json.dumps(self._check()))
            found = NodeResult.from_json(json.loads(path.read_text()))
        write_whole(folder / f"node-{self._node}.json", json.dumps(found.to_json()))
        return found

    def _check(self) -> object:
        process = self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
        if self._closed:
            process.kill()
        try:
            out, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        return json.loads(out)


def judge(results: Mapping[NodeId, object]) -> list[str]:
    """What speaks against beginning, a sentence for each check of a node; pure.

    Args:
      results: of each node, as its agent told it. What is none counts as a failure.
    """
    known: dict[NodeId, NodeResult] = {}
    wrong: list[str] = []
    for node, told in sorted(results.items()):
        try:
            known[node] = NodeResult.from_json(told)
        except ProtocolError as error:
            wrong.append(f"node {node}: {error}")
    compared = against_peers(list(known.values()))
    for node, result in zip(known, compared, strict=True):
        wrong += [f"node {node}, {words}" for words in complaints([result])]
    return wrong
