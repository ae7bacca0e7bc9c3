"""Parity between nodes: any m of a group may vanish, and their snapshots are computed anew.

rounds    what one round protects: names and values
protocol  when a round counts, and what may be overwritten (pure)
buffer    where a node keeps its shards
parts     the parts of a node, found and pinned
streams   shards of other nodes, each chunk checked
combine   shards computed from others, a window at a time
holder    a node's half of a round, and its byte server's operations
leader    the other half: one node asks all
mend      what this node lost or what rotted here, computed from the others
"""
