"""Mending: collectives that outlive a member, in a group that nobody else repairs.

With `OnLoss.RETRY` or `LEAVE_OUT`, a loss does not reach the caller. The survivors agree on
who is left (`survivors`), edit the group to that world, and run what was pending again, from
a copy of its input. Two things make that sound, and are what it costs:

- a copy of the input of every operation that overwrites it, made when it is issued;
- a second, empty round after each operation, which commits it (`mended_op`). So no caller
  sees a result that another rank still lacks.

After a loss an operation either is committed somewhere, and then its result is held
everywhere and it is completed; or nowhere, and then it runs again everywhere. Only
all_reduce, broadcast and barrier come to a result then: those of the others have a place for
each rank of the old world, and they end with GenerationAborted, as do messages and the
groups that have lost a member. A generation that ended without a loss (a timeout, an abort)
is not mended either.
"""

import logging
import threading
import time
from collections import defaultdict, deque
from typing import Any

from ftkit.collectives.channel import Channel
from ftkit.collectives.config import OnLoss
from ftkit.collectives.group import Group
from ftkit.collectives.handle import Handle, failed
from ftkit.collectives.mended_op import Again, MendedOp
from ftkit.collectives.op import Program
from ftkit.collectives.survivors import Statement, agreed, committed_anywhere, may_go_on
from ftkit.core.errors import FtkitError, GenerationAborted, ProtocolError, WireError
from ftkit.core.ids import Generation, MemberId
from ftkit.core.world import World

logger = logging.getLogger(__name__)

_LOOK_S = 0.02
_EDIT_S = 0.2
#: For the news of a loss to come after the end of the generation.
_GRACE_S = 1.0
#: Deaths are seen at once; who has not spoken by then is stopped, and nothing tells us so.
_AGREE_S = 20.0


class Mender:
    """See the module. Give `take_fault` and `take_statement` to the Group, then `watch` it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._pending: dict[Channel, deque[MendedOp]] = defaultdict(deque)
        self._committed: dict[int, int] = defaultdict(int)
        self._understood: dict[Channel, Generation] = {}
        self._lost: frozenset[MemberId] = frozenset()
        self._said: Statement | None = None
        self._heard: dict[MemberId, Statement] = {}
        self._fault: str | None = None
        self._mending = False
        self._fault_in = Generation(0)
        self._since_s = 0.0
        self._hopeless: str | None = None
        self._thread: threading.Thread | None = None

    def watch(self, group: Group) -> None:
        """Begin: `group` stands in its first world, before anything is issued."""
        self._group = group
        self._first = group.world
        self._understood[group.channel] = self._first.generation
        with self._changed:
            self._thread = threading.Thread(target=self._run, name="ftkit-mender", daemon=True)
            if group.aborted:
                self._begin(group.world.generation, "the first generation ended as it began")
        self._thread.start()

    def close(self) -> None:
        """End the thread, after the group was closed; what is pending fails."""
        self._give_up("the group was closed")
        if self._thread is not None:
            self._thread.join()

    # -- any thread -------------------------------------------------------------------------

    def issue(
        self,
        channel: Channel,
        name: str,
        program: Program,
        *,
        nbytes: int,
        limit_s: float | None,
        mode: OnLoss,
        again: Again | None,
    ) -> Handle[Any]:
        """As `Channel.issue`; what is issued while we mend, waits."""
        op = MendedOp(
            channel=channel,
            name=name,
            program=program,
            nbytes=nbytes,
            limit_s=limit_s,
            mode=mode,
            again=again,
            understood=self._understood,
        )
        with self._changed:
            if self._hopeless is not None:
                return failed(GenerationAborted(self._hopeless))
            self._pending[channel].append(op)
            if not self._mending:
                self._launch(op)
        return op.handle

    def take_fault(self, generation: Generation, lost: frozenset[MemberId], reason: str) -> None:
        """A generation ended (`on_fault`). Does not block."""
        with self._changed:
            self._lost |= lost
            if self._thread is not None:
                self._begin(generation, reason)

    def take_statement(self, member: MemberId, payload: bytes) -> None:
        """Another survivor speaks (`on_tell`). Does not block."""
        try:
            statement = Statement.from_bytes(payload)
        except ProtocolError as error:
            logger.warning("member %s: %s", member, error)
            return
        with self._changed:
            self._heard[member] = statement
            self._changed.notify_all()
            if self._thread is not None and not self._mending:
                self._heed(self._group.world)

    def _begin(self, generation: Generation, reason: str) -> None:
        """With the lock held: the generation is over."""
        self._fault, self._fault_in, self._mending = reason, generation, True
        self._since_s = time.monotonic()
        self._changed.notify_all()

    def _heed(self, world: World) -> None:
        """With the lock held: end a world of which somebody has lost a member.

        We may have a link to it: one that broke for a moment, and was made again. Its member
        has lost its place all the same.
        """
        for member, statement in self._heard.items():
            gone = statement.lost & world.member_ids
            if gone and member in world.member_ids:
                reason = f"member {member} has lost {sorted(gone)}"
                self._begin(world.generation, reason)
                self._group.abort(world.generation, reason)
                return

    # -- the life of an operation -------------------------------------------------------------------

    def _launch(self, op: MendedOp) -> None:
        """With the lock held."""
        op.launch().add_done_callback(lambda handle: self._ended(op, handle))

    def _ended(self, op: MendedOp, handle: Handle[Any]) -> None:
        """On the communication thread; on ours, when it was refused."""
        with self._changed:
            if isinstance(handle.error, GenerationAborted) and not self._is_stranded(op.channel):
                return  # the mender's now
            self._close(op)
        if handle.error is None:
            op.complete()
        else:
            op.handle.fail(handle.error)

    def _is_stranded(self, channel: Channel) -> bool:
        """Whether nothing will ever be run again on `channel`."""
        members = frozenset(channel.members)
        return self._hopeless is not None or not members <= self._group.world.member_ids

    def _close(self, op: MendedOp) -> None:
        """With the lock held: it is the mender's no longer."""
        pending = self._pending[op.channel]
        if op in pending:
            pending.remove(op)
            self._committed[op.channel.id] += 1

    # -- the mender's thread --------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._fault is None and self._hopeless is None:
                    self._changed.wait()
            try:
                self._mend()
            except FtkitError as error:
                self._give_up(str(error))
                return
            except Exception as error:
                # A bug here must not leave anybody waiting for ever.
                logger.exception("mending failed")
                self._give_up(f"mending failed: {error!r}")
                return

    def _mend(self) -> None:
        deadline = time.monotonic() + _AGREE_S
        reason = ""
        while True:
            self._agree(deadline, self._fault or reason)
            living = self._living()
            # Of the first world, not the last: all must judge alike, and one may have gone
            # through a world that another has not seen.
            if not may_go_on(self._first.member_ids, living):
                raise GenerationAborted(
                    f"members {sorted(living)} are no majority of "
                    f"{sorted(self._first.member_ids)}: the others may go on without us"
                )
            world = World.of(
                Generation(self._first.generation + len(self._lost)),
                [m for m in self._first.members if m.member in living],
            )
            with self._changed:
                reason, self._fault = self._fault or reason, None
            try:
                # The survivors' links stand: an edit that waits, waits for the newly dead.
                self._group.edit(world, timeout_s=_EDIT_S)
            except (GenerationAborted, WireError) as error:
                logger.info("generation %s did not begin: %s", world.generation, error)
                if time.monotonic() > deadline:
                    raise
                with self._changed:
                    self._changed.wait(_LOOK_S)  # for the news of who else is lost
                continue
            with self._changed:
                if self._fault_in < world.generation:
                    self._fault = None  # late news of a generation that is replaced
                self._settle(living)
                self._mending = self._fault is not None
                if not self._mending:
                    self._heed(world)
            return

    def _agree(self, deadline: float, reason: str) -> None:
        """Block until the survivors say the same.

        Raises:
          GenerationAborted: they do not; we are counted among the lost; or nobody is lost, and
            `reason` is not for us to mend.
        """
        while True:
            with self._changed:
                if self._hopeless is not None:
                    raise GenerationAborted(self._hopeless)
                self._add_up()
                if self._group.member in self._lost:
                    raise GenerationAborted("the others went on without this member")
                living = self._living() - {self._group.member}
                if self._said is None or self._said.lost != self._lost:
                    self._said = Statement(self._lost, dict(self._committed))
                    self._tell(self._said)
                if not self._lost & self._group.world.member_ids:
                    if time.monotonic() > self._since_s + _GRACE_S:
                        raise GenerationAborted(reason)
                elif agreed(self._said, self._heard, living):
                    return
                if time.monotonic() > deadline:
                    raise GenerationAborted(
                        f"the survivors {sorted(living)} did not agree on who is lost "
                        f"({sorted(self._lost)} here) within {_AGREE_S} s"
                    )
                self._changed.wait(_LOOK_S)

    def _add_up(self) -> None:
        """Learn losses from links and statements: a second one is not reported as a fault."""
        self._lost |= self._group.unlinked
        for member, statement in self._heard.items():
            if member not in self._lost:
                self._lost |= statement.lost

    def _tell(self, statement: Statement) -> None:
        """Also the lost, should they live: they learn so that nobody waits for them."""
        for member in self._first.member_ids - {self._group.member}:
            try:
                self._group.tell(member, statement.to_bytes())
            except WireError:
                pass  # there is no link

    def _settle(self, living: frozenset[MemberId]) -> None:
        """With the lock held: complete what is held by all, run the rest again, in order."""
        assert self._said is not None, "we spoke before we agreed"
        statements = [self._said, *(s for m, s in self._heard.items() if m in living)]
        for channel, pending in list(self._pending.items()):
            held_by_all = committed_anywhere(channel.id, statements)
            for op in list(pending):
                if op.held and self._committed[channel.id] < held_by_all:
                    self._close(op)
                    op.complete()
                elif self._is_stranded(channel):
                    self._close(op)
                    lost = sorted(self._lost)
                    op.handle.fail(GenerationAborted(f"members of this group are lost: {lost}"))
                else:
                    op.restore()
                    self._launch(op)

    def _give_up(self, reason: str) -> None:
        """Fail all that is pending; the group stays as it is."""
        with self._changed:
            self._hopeless = self._hopeless or reason
            ops = [op for pending in self._pending.values() for op in pending]
            self._pending.clear()
            self._changed.notify_all()
        for op in ops:
            op.handle.fail(GenerationAborted(reason))

    def _living(self) -> frozenset[MemberId]:
        return self._first.member_ids - self._lost
