"""Identifiers, and the glossary: one word, one meaning, throughout ftkit.

========== =====================================================================
word       meaning
========== =====================================================================
job        one `ftkit run`: all processes, files and shared memory under one name
node       a host; on the embedded engine, one agent and its own failure domain
boot       one life of a node's agent. A new agent has another, and none of the
           processes and memory of the one before
seat       a rank's place in the job: fixed at launch, inherited by the process
           that replaces a dead one. Seats 0..N-1, `--nproc` of them on each node
member     one incarnation of a seat: a process, from spawn to exit. Never reused
rank       a member's number in one world: its position in the order of seats
world      the members of one generation
generation a number that rises with every change of membership. Everything on the
           wire carries it; what is older is refused
term       a number that rises with every coordinator, so that orders from one
           that was replaced are refused
step       an optimizer step that was committed. Step t is the t-th, counted from
           1; state "at step 0" is the initial one
mode       what the job as a whole is doing: forming, running, halting, ended
phase      where a rank stands in a step, or before and after its training
standing   a rank's own account of where it is; a track is what detection knows of it
link       the data connection between two members; a line is a control connection,
           and a channel an ordered set of members with collectives of their own
attempt    one try at playing a step, in one generation
slot       a fixed place in the global batch whose gradient is one term of the
           canonical sum
snapshot   the state captured at a step
layout     the names, dtypes and boxes of one rank's tensors, and their order as bytes.
           Replicas have the same one
part       a range of the bytes of a layout: what one seat captured of a snapshot
shard      one rank's part of a sharded tensor; of a stripe, one piece of data or parity
stripe     the shards that share parity
copy       a part of a snapshot in one place, sealed
tier       where a copy lives: live tensors, arena, peer parity, disk, object store
source     what bytes are read from: a copy, here or on another node, or a checkpoint
arena      the shared-memory file that holds one seat's snapshots
slab       a fixed piece of an arena: it holds one part, or none
pin        a tier's mark on a slab: it reads it, so nobody may overwrite it
checkpoint a persisted snapshot
verdict    what detection concluded, with evidence
incident   a verdict and everything done about it, until training goes on
drill      a fault on purpose, with a checked outcome
========== =====================================================================
"""

from typing import NewType

JobId = NewType("JobId", str)
NodeId = NewType("NodeId", int)
Boot = NewType("Boot", str)
Seat = NewType("Seat", int)
MemberId = NewType("MemberId", int)
Rank = NewType("Rank", int)
Generation = NewType("Generation", int)
Term = NewType("Term", int)
Step = NewType("Step", int)
Slot = NewType("Slot", int)
