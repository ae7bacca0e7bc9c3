"""Metrics: what an agent knows, as text that Prometheus scrapes.

Written down once, in `CATALOGUE`: base units, `_total` for what only rises, and labels of few values:
job, node, rank, phase, resource, disk. Never a step or a generation as a label.
"""

import threading
from collections.abc import Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ftkit import __version__
from ftkit.core.ids import NodeId
from ftkit.detection.signals import NodeSeen

#: Name -> (type, what it is).
CATALOGUE: Mapping[str, tuple[str, str]] = {
    "ftkit_info": ("gauge", "1; the version is a label."),
    "ftkit_agent_coordinator_connected": ("gauge", "Whether a coordinator is connected and heard."),
    "ftkit_rank_starts_total": ("counter", "Processes started for a rank's seat."),
    "ftkit_rank_exits_total": ("counter", "Processes of a seat that ended with an error."),
    "ftkit_rank_step": ("gauge", "The step that the rank is at."),
    "ftkit_rank_generation": ("gauge", "The number of the world that the rank is in."),
    "ftkit_rank_steps_total": ("counter", "Steps finished."),
    "ftkit_rank_phase_seconds_total": ("counter", "Time of the training thread by phase."),
    "ftkit_rank_waiting_seconds_total": ("counter", "Time blocked in collectives."),
    "ftkit_rank_gc_seconds_total": ("counter", "Time taken by Python's garbage collector."),
    "ftkit_rank_loss_value": ("gauge", "Mean loss of the rank's own slots in its last step."),
    "ftkit_rank_gradient_norm": ("gauge", "Norm of what the rank added to the gradients."),
    "ftkit_rank_resident_memory_bytes": ("gauge", "Resident memory of the process."),
    "ftkit_rank_cpu_seconds_total": ("counter", "Processor time of the present process."),
    "ftkit_node_memory_available_bytes": ("gauge", "Memory that can be had without swapping."),
    "ftkit_node_pressure_ratio": ("gauge", "Share of ten seconds in which some process waited."),
    "ftkit_node_disk_free_bytes": ("gauge", "Free where ftkit writes."),
    "ftkit_node_disk_next_bytes": ("gauge", "What is written there next."),
    "ftkit_snapshot_step": ("gauge", "The newest step of which a part is sealed on the node."),
    "ftkit_checkpoint_written_bytes": ("gauge", "Written by this node of the present checkpoint."),
}

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """The values. Thread-safe: the agent's thread writes, those of scrapes read."""

    def __init__(self, job: str, node: NodeId) -> None:
        self._common = {"job": job, "node": str(node)}
        self._values: dict[tuple[str, Labels], float] = {}
        self._lock = threading.Lock()
        self.set("ftkit_info", 1, version=__version__)

    def set(self, name: str, value: float, **labels: object) -> None:
        """It is so much now."""
        with self._lock:
            self._values[self._key(name, labels)] = float(value)

    def add(self, name: str, value: float = 1, **labels: object) -> None:
        """So much more of it."""
        key = self._key(name, labels)
        with self._lock:
            self._values[key] = self._values.get(key, 0.0) + value

    def take_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Status rows with what /proc says, as they are reported."""
        for item in rows:
            rank, row, facts = item["seat"], item["row"], item["facts"]
            self.set("ftkit_rank_step", row["step"], rank=rank)
            self.set("ftkit_rank_generation", row["generation"], rank=rank)
            if facts:
                self.set("ftkit_rank_resident_memory_bytes", facts["rss_bytes"], rank=rank)
                cpu_s = facts["cpu_ticks"] / facts["ticks_per_s"]
                self.set("ftkit_rank_cpu_seconds_total", cpu_s, rank=rank)

    def take_steps(self, steps: Iterable[Mapping[str, Any]]) -> None:
        """Finished steps (`StepSeen` as JSON)."""
        for step in steps:
            rank = step["seat"]
            self.add("ftkit_rank_steps_total", rank=rank)
            self.add("ftkit_rank_waiting_seconds_total", step["waited_s"], rank=rank)
            self.add("ftkit_rank_gc_seconds_total", step["gc_s"], rank=rank)
            for phase, seconds in step["seconds"].items():
                self.add("ftkit_rank_phase_seconds_total", seconds, rank=rank, phase=phase)
            if step["loss"] is not None:
                self.set("ftkit_rank_loss_value", step["loss"], rank=rank)
            if step["grad_norm"] is not None:
                self.set("ftkit_rank_gradient_norm", step["grad_norm"], rank=rank)

    def take_node(self, seen: NodeSeen, names: Mapping[str, str]) -> None:
        """What the node has left; `names` are short ones for the paths of its disks."""
        self.set("ftkit_node_memory_available_bytes", seen.available_bytes)
        for resource, share in seen.pressure.items():
            self.set("ftkit_node_pressure_ratio", share, resource=resource)
        for path, (free, due) in seen.disks.items():
            self.set("ftkit_node_disk_free_bytes", free, disk=names.get(path, path))
            self.set("ftkit_node_disk_next_bytes", due, disk=names.get(path, path))

    def take_tiers(self, facts: Mapping[str, Any]) -> None:
        """What the node keeps (`Tiers.facts`)."""
        newest = max((int(copy["step"]) for copy in facts["copies"]), default=None)
        if newest is not None:
            self.set("ftkit_snapshot_step", newest)
        if facts.get("persister"):
            self.set("ftkit_checkpoint_written_bytes", facts["persister"]["written"])

    def values(self) -> dict[tuple[str, Labels], float]:
        """All of it now, by name and labels."""
        with self._lock:
            return dict(self._values)

    def render(self) -> str:
        """All of it in Prometheus' text format, version 0.0.4."""
        values = self.values()
        lines = list[str]()
        for name, (kind, text) in CATALOGUE.items():
            mine = sorted((labels, value) for (n, labels), value in values.items() if n == name)
            if not mine:
                continue
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            for labels, value in mine:
                told = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
                lines.append(f"{name}{{{told}}} {_number(value)}")
        return "\n".join(lines) + "\n"

    def _key(self, name: str, labels: Mapping[str, object]) -> tuple[str, Labels]:
        assert name in CATALOGUE, f"{name} is in no catalogue"
        every = self._common | {key: str(value) for key, value in labels.items()}
        return name, tuple(every.items())


class MetricsServer:
    """Serves `GET /metrics` at an address, and nothing else. Owns a thread."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Begin to serve. OSError when the port is taken; 0 takes any."""

        class Handler(BaseHTTPRequestHandler):
            timeout = 5  # whoever connects and asks for nothing is hung up on

            def do_GET(self) -> None:
                if self.path != "/metrics":
                    self.send_error(404)
                    return
                body = metrics.render().encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
                return

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="ftkit-metrics", daemon=True
        )
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Where it serves."""
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if value != value:  # noqa: PLR0124 - NaN
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) else repr(value)
