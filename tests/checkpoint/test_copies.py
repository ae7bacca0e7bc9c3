"""What the arenas of a node are taken to hold, whatever else lies in the folder."""

from pathlib import Path

from ftkit.checkpoint.arena import arena_path
from ftkit.checkpoint.copies import local_copies
from ftkit.checkpoint.layout import StateLayout
from ftkit.checkpoint.provision import ensure_arena
from ftkit.core.ids import Generation, JobId, NodeId, Seat, Step

LAYOUT = StateLayout.of([("w", "uint8", (100,))])


def test_snapshots_of_another_job_do_not_count(tmp_path: Path) -> None:
    for job, step in (("t", 3), ("t-1", 9), ("other", 9)):
        path = arena_path(JobId(job), Seat(1), tmp_path)
        with ensure_arena(path, LAYOUT, chunk_bytes=64) as arena:
            writer = arena.start(Step(step), Generation(1), LAYOUT)
            writer.data[:] = 7
            writer.digest(range(len(writer.table)))
            writer.seal(b"{}")
    (tmp_path / "ftkit-t-2.arena").write_bytes(b"no arena")
    (copy,) = local_copies(JobId("t"), tmp_path, NodeId(4))
    assert (copy.seat, copy.node, copy.step) == (1, 4, 3)
    assert (copy.part.first, copy.part.end) == (0, LAYOUT.total_bytes)
