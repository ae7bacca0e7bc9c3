"""Which drills there are: their names, what each does, and what a job needs for it."""

from ftkit.core.fault_plan import DESYNCS, KILL_COORDINATOR, Kind, Point
from ftkit.core.verdict import Fault
from ftkit.launch import (
    detector_drills,
    mixed_drills,
    multi_drills,
    number_drills,
    pace_drills,
    resource_drills,
    restart_drill,
    rot_drills,
)
from ftkit.launch.clean_drill import CLEAN
from ftkit.launch.drill_faults import LOSE_NODE, PREEMPT
from ftkit.launch.faulty_store import StoreFaultKind

#: The bundled training job.
WORKLOAD = "ftkit.launch.workload.train"
KILL_IN_COLLECTIVE = "kill-in-collective"

#: A rank whose script calls other collectives than its peers'.
DESYNC = "desync"

#: One rank is lost while another loses time.
TWO_AT_ONCE = "two-at-once"

#: Faults of members over time, struck from outside.
FLAP, JOIN, CHURN = "flap", "join", "churn"
#: Two ranks lost soon after one another, so that the world shrinks twice before it grows back.
SHRINK_GROW = "shrink-grow"
#: A stage of a pipeline.
STAGE_LOST = "stage-lost"
#: A rank of a job that keeps one warm to replace it.
SPARE = "spare"
#: Faults of the link between two ranks.
PARTITION, SLOW_LINK, SLOW_NIC, BLACKHOLE = "partition", "slow-link", "slow-nic", "blackhole"
#: All links of one rank.
PARTITION_MINORITY = "partition-minority"
#: All links between two halves of the nodes, the coordinator in one of them.
PARTITION_HALF = "partition-half"
LINK_FAULTS = (PARTITION, PARTITION_MINORITY, PARTITION_HALF, SLOW_LINK, SLOW_NIC, BLACKHOLE)

CATALOGUE: dict[str, str] = {
    Kind.KILL: "SIGKILL to one rank",
    Kind.STOP: "SIGSTOP to one rank: it is there and does nothing",
    Kind.RAISE: "an exception in one rank's code",
    Kind.HANG: "one rank's training thread sleeps for ever, its heartbeat goes on",
    Kind.EXIT: "one rank ends at once with exit code 1, and says nothing",
    Kind.SEGFAULT: "one rank reads memory that is not its own",
    Kind.ABORT: "one rank calls abort(), as a failed check in native code does",
    Kind.OOM: "one rank allocates until its address space is used up",
    Kind.PAUSE: "SIGSTOP to one rank, and SIGCONT a second later: nobody may lose its place",
    Kind.GIL_HANG: "one rank's training thread is in native code that keeps the interpreter",
    Kind.SPIN: "one rank's training thread runs round in a loop that does not end",
    Kind.DEADLOCK: "one rank's training thread waits for a lock that it holds itself",
    DESYNC: "one of the next three, as the seed picks",
    Kind.DESYNC_SKIP: "one rank leaves out a collective that the others call",
    Kind.DESYNC_SIZE: "one rank calls a collective with fewer elements than the others",
    Kind.DESYNC_OP: "one rank calls another collective than the others",
    KILL_COORDINATOR: "SIGKILL to the coordinator while the ranks train",
    KILL_IN_COLLECTIVE: "SIGKILL to one rank at a byte of what it moves for an all-reduce",
    FLAP: "SIGKILL to one rank, and to each that replaces it once that has trained a little",
    JOIN: "a rank comes in while the others train: nobody may be held up or taken back",
    CHURN: "SIGKILL to random ranks at random moments, for as long as there are steps left",
    SHRINK_GROW: "SIGKILL to one rank and, some steps later, to another: the world shrinks, shrinks, grows",
    STAGE_LOST: "SIGKILL to one stage of a pipeline: the others take its layers until it is back",
    PREEMPT: "SIGTERM to one node's agent: its ranks must leave without a step played again",
    SPARE: "SIGKILL to one rank of a job with a spare one: it must be in within two steps",
    PARTITION: "the link between two ranks breaks and cannot be made anew for some seconds",
    PARTITION_MINORITY: "one rank is cut off from all others for some seconds: they go on without it",
    PARTITION_HALF: "the nodes fall apart into halves: that with the coordinator goes on alone",
    SLOW_LINK: "the link between two ranks carries a fraction of its bytes for some seconds",
    SLOW_NIC: "all that one rank sends, or receives, or both, is slow for some seconds",
    BLACKHOLE: "the link between two ranks stays open and carries nothing until it is named",
    **pace_drills.CATALOGUE,
    CLEAN: "nothing, beside evaluations, checkpoints, a busy core and a node that leaves with notice",
    StoreFaultKind.KILL: "SIGKILL to an agent at a byte of a checkpoint that it writes",
    StoreFaultKind.FULL: "the disk is full from a byte of a checkpoint on",
    StoreFaultKind.SLOW: "one node's disk is slow from a byte of a checkpoint on",
    **multi_drills.CATALOGUE,
    **mixed_drills.CATALOGUE,
    **rot_drills.CATALOGUE,
    **restart_drill.CATALOGUE,
    **number_drills.CATALOGUE,
    **resource_drills.CATALOGUE,
    **detector_drills.CATALOGUE,
    TWO_AT_ONCE: "SIGKILL to one rank, and another becomes slow in the same steps",
}

#: How many ranks the smallest job has that such a fault can be done to.
RANKS_MIN: dict[str, int] = {
    FLAP: 2,
    JOIN: 2,
    CHURN: 3,
    SHRINK_GROW: 3,
    STAGE_LOST: 2,
    SPARE: 2,
    PREEMPT: 2,
    PARTITION: 3,
    PARTITION_MINORITY: 3,
    PARTITION_HALF: 4,
    **multi_drills.RANKS_MIN,
    **mixed_drills.RANKS_MIN,
    SLOW_LINK: 3,
    SLOW_NIC: 3,
    BLACKHOLE: 3,
    **dict.fromkeys((*pace_drills.CATALOGUE, CLEAN), pace_drills.RANKS_MIN),
    Kind.PAUSE: 2,
    TWO_AT_ONCE: 4,
    **dict.fromkeys(DESYNCS, 3),
}

#: What "all" picks from: faults that any shape of job takes, in the order that seeds know.
ANYWHERE = [Kind.KILL, Kind.STOP, Kind.RAISE, Kind.HANG, KILL_COORDINATOR]

#: What the first verdict on the rank has to be called, where the drill is about that.
NAMES: dict[str, frozenset[str]] = {
    Kind.EXIT: frozenset({Fault.EXITED}),
    Kind.SEGFAULT: frozenset({Fault.EXITED}),
    Kind.ABORT: frozenset({Fault.EXITED}),
    Kind.OOM: frozenset({Fault.OOM}),
    Kind.GIL_HANG: frozenset({Fault.HANG_BUSY}),
    Kind.SPIN: frozenset({Fault.HANG_BUSY}),
    Kind.DEADLOCK: frozenset({Fault.HANG_BLOCKED}),
    **dict.fromkeys(DESYNCS, frozenset({Fault.DESYNC})),
}

#: Before this step the job has no tempo yet that a hang could be told by.
NAMED_FROM = 25

LOSE_NODES = "lose-nodes"
CORRUPT_SHARD = "corrupt-shard"

#: Faults of whole nodes, and how many nodes the smallest job has that survives them.
NODE_FAULTS: dict[str, int] = {LOSE_NODE: 3, LOSE_NODES: 4, CORRUPT_SHARD: 4}

NODE_CATALOGUE: dict[str, str] = {
    LOSE_NODE: "SIGKILL to one node's agent and ranks; its shared memory is gone",
    LOSE_NODES: "the same to as many nodes as parity allows, and SIGKILL to all other ranks",
    CORRUPT_SHARD: "bits flipped in one snapshot and one parity shard; then a node and all ranks",
}

#: Faults after which every process may still be there.
NOBODY_LOST = (
    *(KILL_COORDINATOR, PREEMPT, StoreFaultKind.FULL, StoreFaultKind.SLOW, *LINK_FAULTS),
    *pace_drills.CATALOGUE,
    CLEAN,
    *(Kind.PAUSE, *DESYNCS),
    *number_drills.CATALOGUE,
    *resource_drills.CATALOGUE,
    *detector_drills.CATALOGUE,
    # Nobody is left to be told of a loss: what becomes of it is judged by rules of its own.
    *rot_drills.CATALOGUE,
)

#: How often such a fault has to strike before a drill says anything.
STRIKES: dict[str, int] = {**multi_drills.STRUCK, FLAP: 3, CHURN: 3, SHRINK_GROW: 2}

#: Steps between the two losses of "shrink-grow": fewer than anybody needs to come back.
SHRINK_STEPS = 1

#: Faults of two seats.
OF_TWO = (*LINK_FAULTS, SHRINK_GROW, TWO_AT_ONCE)

#: Faults over time, and of links: no step has them.
OF_NO_POINT = (FLAP, JOIN, CHURN, PREEMPT, *LINK_FAULTS, CLEAN, *pace_drills.CATALOGUE)

#: What a training thread does to itself.
USERS = frozenset(set(Kind) - {Kind.KILL, Kind.STOP, Kind.HANG})

#: Points at which a bucket is named.
OF_BUCKETS = (Point.BACKWARD, Point.ALL_REDUCE, Point.IN_COLLECTIVE)

#: Buckets of gradients that a drill may aim at; a job with fewer is hit at its last one.
BUCKETS = 3

#: What a step of the bundled job takes longer while a seat is empty, in drills of members: less,
#: and a job of 200 steps may end before a rank is back for the third time.
SHORT_HANDED_S = 0.25

#: What each of three nodes of the bundled job writes in its first checkpoint, about.
STORE_BYTES = 1_000_000

#: What each has written by the time when it is known how long that takes.
USUAL_BYTES = 4 * STORE_BYTES
