"""What `ftkit run` says of the last checkpoint, and when it says nothing."""

from pathlib import Path

from ftkit.core.trace import Trace
from ftkit.launch.last_words import LastWords


def test_progress_and_failure_are_told_once_and_success_is_silent(tmp_path: Path) -> None:
    told = list[str]()
    words = LastWords(tmp_path, "/data/ck", told.append)
    words.poll()
    with Trace(tmp_path / "events" / "coordinator-1.jsonl", coordinator=1) as trace:
        trace.event("checkpoint-progress", step=45, bytes=1_200_000, of=4_000_000)
        words.poll()
        words.poll()
        assert told == [
            (
                "the job is over; the checkpoint of step 45 is being written to /data/ck: 1.2 MB "
                "of 4 MB (Ctrl-C ends without it)"
            )
        ]
        trace.event("checkpoint-last", step=45, failed="the disk is full.")
        words.poll()
        assert told[1:] == [
            (
                "warning: the job's last step, 45, is not on disk: the disk is full. A next run "
                "goes on from what is there (`ftkit ckpt ls /data/ck`)"
            )
        ]
        assert words.told == {"step": 45, "failed": "the disk is full."}
        trace.event("checkpoint-last", step=45, failed="")
        words.poll()
        assert len(told) == 2
        assert words.told == {"step": 45, "failed": ""}
