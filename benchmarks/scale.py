"""How far one coordinator carries: the real one, fed with the reports of up to 10,000 ranks.

No process is started and no network is used. A `Coordinator` on a clock of ours is handed the
reports of all agents, as text, in the form and at the pace in which agents send them: eight
ranks a node, two reports a second, a step a second. The processor time that it takes is added to
the clock, so that a coordinator which cannot keep up falls behind here as it would there. Faults
strike at random moments; a verdict's delay counts from the arrival of the report that tells.
"""

import gc
import json
import random
import sys
import tempfile
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.figures import RESULTS, Figure, Report, finish, parser, percentile, say
from ftkit.core.clock import ManualClock
from ftkit.core.ids import Generation, MemberId, NodeId, Seat, Step
from ftkit.detection.observations import ProcessFacts
from ftkit.detection.row import Phase, Row
from ftkit.detection.signals import StepSeen, to_json
from ftkit.launch.config import JobConfig, new_job_id, new_secret
from ftkit.launch.coordinator import Coordinator
from ftkit.recovery.facts import MemberFacts, Stage
from ftkit.recovery.plan import Plan

PER_NODE = 8
TICK_S, STEP_S = 0.5, 1.0
SIZES = (1_000, 2_000, 5_000, 10_000)
MADE_UP = (
    "the coordinator and its detectors are the real ones, the agents' reports are made up and arrive "
    "as text; the network and the decoding of frames are not in it"
)
#: Growth from the smallest to the largest size, over that of the size, that still counts as linear.
LINEAR = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One size."""

    ranks: int
    step_cpu_s: float
    """Processor time for all that comes in a step, and for judging it."""
    look_cpu_s: float
    """Of judging alone: one look."""
    memory_bytes: int
    report_bytes: int
    verdict_s: list[float]
    """From the report's arrival to the order that answers it."""


class Fleet:
    """The agents of a healthy job, as their reports say."""

    def __init__(self, ranks: int) -> None:
        self.nodes = ranks // PER_NODE
        self.step = 10
        self.generation = 0
        self.dead: set[int] = set()

    def report(self, node: int, at: float) -> str:
        """What the agent of a node says now."""
        seats = range(node * PER_NODE, (node + 1) * PER_NODE)
        rows, members, told = [], [], []
        ns = int(at * 1e9)
        for seat in seats:
            dead = seat in self.dead
            active = self.generation > 0
            stage = Stage.DEAD if dead else Stage.ACTIVE if active else Stage.READY
            members.append(
                MemberFacts(
                    member=MemberId(seat),
                    seat=Seat(seat),
                    node=NodeId(node),
                    stage=stage,
                    generation=Generation(self.generation),
                    step=Step(self.step) if active else None,
                    host="10.0.0.1",
                    port=29_500,
                    pid=1000 + seat,
                    exit_code=-9 if dead else None,
                    stepping=True,
                ).to_json()
            )
            if dead or not active:
                continue
            row = Row(
                member=MemberId(seat), pid=1000 + seat, generation=Generation(self.generation),
                step=Step(self.step), phase=Phase.FORWARD, group=0, entered=40, left=40,
                op="reduce_slots", t_progress_ns=ns - 30_000_000, t_enter_ns=0,
                t_heartbeat_ns=ns - 5_000_000, allowance_ns=0, warm=True,
            )  # fmt: skip
            facts = ProcessFacts(state="R", cpu_ticks=int(at * 100), rss_bytes=8 << 30)
            rows.append({"seat": seat, "row": row.to_json(), "facts": facts.to_json()})
            told.append(
                StepSeen(
                    member=MemberId(seat),
                    seat=Seat(seat),
                    generation=Generation(self.generation),
                    step=Step(self.step),
                    at=at,
                    seconds={"data": 0.01, "forward": 0.8},
                    waited_s=0.1,
                    cpu_s=0.8,
                    slots=1,
                    loss=2.0,
                )
            )
        steps = [to_json(s) for s in told] if int(at / TICK_S) % 2 else []
        return json.dumps(
            {
                "type": "facts", "node": node, "boot": f"boot-{node}", "name": f"node-{node}",
                "members": members, "copies": [], "store": ["10.0.0.1", 29_501],
                "persister": {}, "parity": {"checked": 0, "holds": [], "given_up": []},
                "rows": rows, "signals": steps, "plan": None, "ended": False, "late_s": 0.0,
                "at": at,
            }
        )  # fmt: skip


class Desk:
    """The coordinator, and a clock that runs with the processor time it takes."""

    def __init__(self, fleet: Fleet, folder: Path) -> None:
        config = JobConfig(
            job=new_job_id(),
            command=("true",),
            nodes=fleet.nodes,
            nproc=PER_NODE,
            run_dir=str(folder),
        )
        self.fleet = fleet
        self.clock = ManualClock(100.0)
        agents = [("127.0.0.1", 1)] * fleet.nodes
        self.coordinator = Coordinator(config, new_secret(), agents, number=1)
        self.coordinator._clock = self.clock  # type: ignore[assignment]
        self.look_cpu_s: list[float] = []
        self.bytes = 0

    def take(self, node: int, text: str) -> None:
        """One report arrives."""
        began = time.process_time()
        self.coordinator._handle("facts", NodeId(node), json.loads(text))
        self.clock.advance(time.process_time() - began)
        self.bytes += len(text)

    def look(self) -> None:
        """Judge what has arrived."""
        began = time.process_time()
        now = self.clock.now()
        self.coordinator._lead(now)
        spent = time.process_time() - began
        self.look_cpu_s.append(spent)
        self.clock.advance(spent)
        self.coordinator._rest.looked(now, self.clock.now())

    def form(self) -> None:
        """From agents that have just come up to a job that trains."""
        empty = self.coordinator._plan
        assert empty is None, "it has not begun"
        texts = [
            json.loads(self.fleet.report(n, self.clock.now())) for n in range(self.fleet.nodes)
        ]
        for node, report in enumerate(texts):
            self.coordinator._handle("facts", NodeId(node), report | {"plan": Plan().to_json()})
        self.look()
        assert self.coordinator._plan is not None, "all agents have spoken"
        world = self.coordinator._plan.world
        assert world is not None, "every rank is ready"
        self.fleet.generation = world.generation

    def play(self, until: float, pending: list[tuple[float, int, str]]) -> None:
        """Everything that arrives before `until`, a look after each batch as in `run`."""
        rest = self.coordinator._rest
        while True:
            came = [item for item in pending if item[0] <= self.clock.now()]
            del pending[: len(came)]
            for _, node, text in came:
                self.take(node, text)
            if (came or rest.owed) and rest.due(self.clock.now()):
                self.look()
                continue
            next_at = min(
                [t for t, _, _ in pending[:1]] + ([rest.until] if rest.owed else []),
                default=float("inf"),
            )
            if next_at >= until:
                break
            self.clock.advance(max(0.0, next_at - self.clock.now()))


def measure(ranks: int, ticks: int, faults: int, rng: random.Random) -> Sample:
    """One size: healthy ticks for the cost, then faults for the delay of verdicts."""
    with tempfile.TemporaryDirectory() as name:
        fleet = Fleet(ranks)
        gc.collect()
        tracemalloc.start()
        desk = Desk(fleet, Path(name))
        desk.form()
        began = desk.clock.now()
        desk.play(began + 1, arrivals(desk, began))
        memory, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        desk.look_cpu_s.clear()
        desk.bytes = 0
        cpu_s = 0.0
        for _ in range(ticks):
            pending = arrivals(desk, desk.clock.now())
            before = time.process_time()
            desk.play(pending[-1][0] + 1e-9, pending)
            cpu_s += time.process_time() - before
        per_step = STEP_S / TICK_S / ticks
        step_cpu_s, report_bytes = cpu_s * per_step, int(desk.bytes * per_step)
        looks = sorted(desk.look_cpu_s)
        delays = [delay_of(desk, rng) for _ in range(faults)]
        desk.coordinator._disk.close()
        desk.coordinator._incidents.close()
        desk.coordinator.trace.close()
    return Sample(
        ranks=ranks,
        step_cpu_s=step_cpu_s,
        look_cpu_s=looks[len(looks) // 2],
        memory_bytes=memory,
        report_bytes=report_bytes,
        verdict_s=delays,
    )


def arrivals(desk: Desk, begin: float) -> list[tuple[float, int, str]]:
    """A tick's reports, evenly spread over it; the fleet has gone on a step in every second."""
    fleet = desk.fleet
    if int(begin / TICK_S) % 2:
        fleet.step += 1
    times = [begin + TICK_S * (n + 1) / fleet.nodes for n in range(fleet.nodes)]
    return [(at, n, fleet.report(n, at)) for n, at in enumerate(times)]


def delay_of(desk: Desk, rng: random.Random) -> float:
    """A rank is killed; its agent tells at once, among all other reports. Then it is undone."""
    fleet, coordinator = desk.fleet, desk.coordinator
    plan, victim = coordinator._plan, rng.randrange(fleet.nodes * PER_NODE)
    assert plan is not None, "it is running"
    begin = desk.clock.now()
    pending = arrivals(desk, begin)
    at = begin + rng.random() * TICK_S
    fleet.dead = {victim}
    node = victim // PER_NODE
    pending = [
        (t, n, fleet.report(n, t) if n == node and t > at else text) for t, n, text in pending
    ]
    pending.append((at, node, fleet.report(node, at)))
    pending.sort(key=lambda item: item[0])
    while coordinator._plan is plan and (pending or coordinator._rest.owed):
        soonest = pending[0][0] if pending else coordinator._rest.until
        desk.play(soonest + 1e-9, pending)
    if coordinator._plan is plan:
        raise RuntimeError(f"the death of rank {victim} was not noticed")
    delay = desk.clock.now() - at
    # As if it had not been: what follows a fault is the protocol's, and measured elsewhere.
    fleet.dead = set()
    coordinator._plan = plan
    coordinator._members[MemberId(victim)] = MemberFacts.from_json(
        json.loads(fleet.report(node, desk.clock.now()))["members"][victim % PER_NODE]
    )
    coordinator._judge = type(coordinator._judge)(coordinator._config)
    coordinator._judge.take_plan(plan, at=desk.clock.now())
    for n in range(fleet.nodes):
        desk.take(n, fleet.report(n, desk.clock.now()))
    return delay


def growth(samples: list[Sample], value: Any) -> float:
    """How much more than in proportion `value` grows from the smallest size to the largest."""
    first, last = samples[0], samples[-1]
    return float(value(last) / value(first) / (last.ranks / first.ranks))


def line_of(s: Sample) -> str:
    """One size, for people; pure."""
    p99 = percentile(s.verdict_s, 99) or 0.0
    return (
        f"{s.ranks:,} ranks: {s.step_cpu_s:.3f} s a step, {s.memory_bytes / 1e6:.0f} MB, one look "
        f"{1e3 * s.look_cpu_s:.0f} ms, verdict p99 {p99:.3f} s"
    )


def plot(samples: list[Sample]) -> str:
    """Cost a step and memory over the number of ranks, as an SVG picture; pure."""
    width, height, left, bottom = 640, 300, 60, 40
    largest = samples[-1].ranks
    panels = [
        ("processor seconds a step", "#1565c0", [s.step_cpu_s for s in samples]),
        ("memory, 100 MB", "#c62828", [s.memory_bytes / 1e8 for s in samples]),
        ("verdict p99, s", "#2e7d32", [percentile(s.verdict_s, 99) or 0.0 for s in samples]),
    ]
    top = max(max(values) for _, _, values in panels) * 1.1

    def x(ranks: float) -> float:
        return left + (width - left - 20) * ranks / largest

    def y(value: float) -> float:
        return height - bottom - (height - bottom - 30) * value / top

    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    out = [
        head + 'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left} 20V{height - bottom}H{width - 20}" fill="none" stroke="#555"/>',
        *(
            f'<text x="{x(s.ranks):.0f}" y="{height - bottom + 16}" text-anchor="middle">'
            f"{s.ranks:,}</text>"
            for s in samples
        ),
    ]
    for part in range(1, 5):
        value = top * part / 4
        out.append(
            f'<text x="{left - 6}" y="{y(value) + 4:.0f}" text-anchor="end">{value:.2g}</text>'
        )
    for number, (label, colour, values) in enumerate(panels):
        points = " ".join(
            f"{x(s.ranks):.0f},{y(v):.0f}" for s, v in zip(samples, values, strict=True)
        )
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out.append(f'<text x="{left + 12}" y="{34 + 16 * number}" fill="{colour}">{label}</text>')
    out.append(
        f'<text x="{width / 2:.0f}" y="{height - 6}" text-anchor="middle">ranks</text></svg>'
    )
    return "\n".join(out) + "\n"


def main(argv: list[str]) -> int:
    """Measure every size and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--sizes", type=int, nargs="+", help="numbers of ranks, ascending")
    arguments.add_argument("--ticks", type=int, help="half seconds of a healthy job, each size")
    arguments.add_argument("--faults", type=int, help="ranks that are killed, each size")
    options = arguments.parse_args(argv)
    sizes = options.sizes or (SIZES[:2] if options.quick else SIZES)
    ticks = options.ticks or (4 if options.quick else 10)
    faults = options.faults or (5 if options.quick else 30)
    rng = random.Random(1)
    samples = []
    for ranks in sizes:
        samples.append(measure(ranks, ticks, faults, rng))
        say(f"{ranks} ranks: {samples[-1].step_cpu_s:.3f} s of processor a step of {STEP_S:g} s")
    last = samples[-1]
    figures = [
        Figure(
            name=f"verdict at {last.ranks} ranks, 99th percentile",
            value=percentile(last.verdict_s, 99),
            unit="s",
            at_most=2.0,
            against="from the report's arrival, on one core",
        ),
        Figure(
            name=f"processor time a second at {last.ranks} ranks",
            value=last.step_cpu_s / STEP_S,
            unit="cores",
            at_most=1.0,
        ),
        Figure(
            name="growth of the cost a step", value=growth(samples, lambda s: s.step_cpu_s),
            unit="x", at_most=LINEAR, against="growth of the job",
        ),
        Figure(
            name="growth of memory", value=growth(samples, lambda s: s.memory_bytes),
            unit="x", at_most=LINEAR, against="growth of the job",
        ),
        Figure(name=f"memory at {last.ranks} ranks", value=last.memory_bytes / 1e6, unit="MB"),
        Figure(name=f"one look at {last.ranks} ranks", value=last.look_cpu_s, unit="s"),
        Figure(
            name=f"reports at {last.ranks} ranks", value=last.report_bytes / STEP_S / 1e6, unit="MB/s"
        ),
    ]  # fmt: skip
    report = Report(
        name="scale",
        figures=figures,
        computed={"ranks": ", ".join(str(s.ranks) for s in samples)},
        notes=[MADE_UP, *map(line_of, samples), "plot: scale.svg"],
        options=vars(options),
        samples=[asdict(s) for s in samples],
    )
    if options.save is not None and not options.quick:
        (options.save or RESULTS).mkdir(parents=True, exist_ok=True)
        (options.save / "scale.svg").write_text(plot(samples))
    return finish(report, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
