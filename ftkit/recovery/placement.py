"""Placement: on which node a seat's next process starts. Pure.

It stays where it was, whatever else is free: its arena and the files that its node has cached are
there. Only a node that is advised against is left, and only for one that can take the rank: its
agent is heard of, nobody advises against it, and the seat's place on a node (the GPU, above all)
is free there. Where there is none, a bad node is better than none.
"""

from ftkit.core.ids import NodeId
from ftkit.recovery.facts import JobFacts
from ftkit.recovery.plan import Assignment, Plan


def place(plan: Plan, seat: Assignment, facts: JobFacts) -> tuple[NodeId, str]:
    """The node for the seat's next process, and why another one than before; "" where it stays.

    Args:
      plan: who is where.
      seat: to be filled.
      facts: with `advised` nodes, and `per_node` places on each.
    """
    why = facts.advised.get(seat.node)
    if why is None or not facts.per_node:
        return seat.node, ""
    local = seat.seat % facts.per_node
    taken = {s.node for s in plan.seats if s.seat != seat.seat and s.seat % facts.per_node == local}
    free = [
        n
        for n in sorted(facts.boots)
        if n not in taken and n not in facts.advised and n not in facts.nodes_lost
    ]
    # Ranks that shared a node are to share the next one, too.
    home = seat.seat // facts.per_node
    with_kin = {s.node for s in plan.seats if s.seat // facts.per_node == home}
    best = min(free, key=lambda n: (n not in with_kin, n), default=None)
    return (seat.node, "") if best is None else (best, why)
