"""LastWords: what `ftkit run` tells people while a job that is over writes its last checkpoint."""

from collections.abc import Callable
from pathlib import Path

from ftkit.launch.event_tail import EventTail
from ftkit.launch.storage_story import readable_size


class LastWords:
    """Follows the coordinator's events of one run. One thread's object."""

    def __init__(self, run_dir: Path, url: str, say: Callable[[str], None]) -> None:
        """Begin to follow the run in `run_dir`; what there is to tell goes to `say`, a line each."""
        # The coordinator's alone: ranks write thousands, and nothing of this.
        self._tail = EventTail(run_dir, files="coordinator-*.jsonl")
        self._url = url
        self._say = say
        self.told: dict[str, object] = {}
        """The last checkpoint for a program: `step` and `failed` (empty when it was written)."""

    def poll(self) -> None:
        """Look, and tell what is new."""
        for event in self._tail.poll():
            match event["kind"]:
                case "checkpoint-progress":
                    self._say(
                        f"the job is over; the checkpoint of step {event['step']} is being written "
                        f"to {self._url}: {readable_size(event['bytes'])} of "
                        f"{readable_size(event['of'])} (Ctrl-C ends without it)"
                    )
                case "checkpoint-last":
                    self.told = {"step": event["step"], "failed": event["failed"]}
                    if event["failed"]:
                        self._say(
                            f"warning: the job's last step, {event['step']}, is not on disk: "
                            f"{str(event['failed']).rstrip('.')}. A next run goes on from what "
                            f"is there (`ftkit ckpt ls {self._url}`)"
                        )
                case _:
                    pass
