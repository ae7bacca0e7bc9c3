"""The host of the churn soak: starts peers, kills them, and decides who is in the world.

It plays the part of a job's coordinator, with pipes for a control plane. A death is seen by
the end of the pipe; a world is formed of all peers that are linked, and whenever one of them is
lost or another is ready the next is announced: gently, so that the peers move between two
rounds, or at once, in the middle of whatever they do.
"""

import multiprocessing as mp
import os
import random
import secrets
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks import churn_peer
from ftkit.core.ids import Generation, MemberId, NodeId, Seat
from ftkit.core.world import Member, World

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "benchmarks.churn_peer"])

#: Between two acts, in seconds; as PCCL's stress test has it.
PAUSE_S = (0.5, 2.0)
#: Of acts that take a peer away: how many freeze it instead, to wake it when it is replaced.
FREEZES = 0.15
#: No round of all peers was completed for so long: something hangs.
STUCK_S = 90.0


@dataclass
class Tally:
    """What happened."""

    seconds: float = 0.0
    started: int = 0
    kills: int = 0
    freezes: int = 0
    worlds: int = 0
    """Worlds announced."""
    settled: int = 0
    """Worlds in which every member completed a round."""
    operations: Counter[str] = field(default_factory=Counter)
    """Checked operations by kind, all peers together."""
    repairs_s: list[float] = field(default_factory=list)
    """From a kill to the first round that all survivors completed afterwards."""
    sizes: Counter[int] = field(default_factory=Counter)
    """Sizes of the worlds that settled."""
    wrong: list[str] = field(default_factory=list)
    """Results that were not what they must be, hangs, and peers that left without being asked."""

    @property
    def checked(self) -> int:
        return sum(n for name, n in self.operations.items() if name != "cut short")


@dataclass
class _Peer:
    id: int
    process: Any
    pipe: Connection
    address: tuple[str, int] | None = None
    linked: bool = False
    doomed: bool = False
    frozen_until: float = 0.0
    entered: int = 0
    settled: int = 0


class Host:
    """See the module. `run` is all there is to call."""

    def __init__(self, *, peers: int, seed: int) -> None:
        self._most = peers
        self._seed = seed
        self._rng = random.Random(seed)
        self._secret = secrets.token_bytes(16)
        self._peers: dict[int, _Peer] = {}
        self._next_id = 0
        self._generation = 0
        self._world: list[int] = []
        self._dirty = False
        self._killed_at: float | None = None
        self._progress = time.monotonic()
        self.tally = Tally()

    def run(self, seconds: float) -> Tally:
        """Soak for so long. Blocks. Every process it started is gone afterwards."""
        begin = time.monotonic()
        try:
            self._start(2)
            act_at = begin + PAUSE_S[1]
            while (now := time.monotonic()) < begin + seconds and not self.tally.wrong:
                self._serve(min(act_at, begin + seconds) - now)
                if time.monotonic() >= act_at:
                    self._act()
                    act_at = time.monotonic() + self._rng.uniform(*PAUSE_S)
                self._thaw()
                self._announce()
                if time.monotonic() - self._progress > STUCK_S:
                    self.tally.wrong.append(self._stuck())
            self._finish()
        finally:
            for peer in self._peers.values():
                peer.process.kill()
            for peer in self._peers.values():
                peer.process.join(10)
        self.tally.seconds = time.monotonic() - begin
        return self.tally

    # -- acts ---------------------------------------------------------------------------------

    def _act(self) -> None:
        well = [p for p in self._peers.values() if not p.doomed]
        if len(well) < self._most and (len(well) < 3 or self._rng.random() < 0.6):
            self._start(1)
            return
        if len(well) < 2:
            return
        victim = self._rng.choice(well)
        victim.doomed = True
        if victim.id in self._world and self._killed_at is None:
            self._killed_at = time.monotonic()
        if self._rng.random() < FREEZES:
            os.kill(victim.process.pid, signal.SIGSTOP)
            # Until the others have moved on without it.
            victim.frozen_until = time.monotonic() + self._rng.uniform(1.0, 3.0)
            self.tally.freezes += 1
            self._dirty = True
            return
        victim.process.kill()
        self.tally.kills += 1

    def _start(self, count: int) -> None:
        for _ in range(count):
            mine, theirs = CONTEXT.Pipe()
            id_, self._next_id = self._next_id, self._next_id + 1
            process = CONTEXT.Process(
                target=churn_peer.main, args=(id_, self._secret, self._seed, theirs)
            )
            process.start()
            theirs.close()
            self._peers[id_] = _Peer(id_, process, mine)
            self.tally.started += 1

    def _thaw(self) -> None:
        """Wake those whose world has moved on: they must be refused, and then they are ended."""
        for peer in list(self._peers.values()):
            if not peer.frozen_until or time.monotonic() < peer.frozen_until:
                continue
            os.kill(peer.process.pid, signal.SIGCONT)
            peer.frozen_until = time.monotonic() + 0.5
            if peer.entered < 0:
                self._lose(peer, expected=True)
            peer.entered = -1

    # -- worlds -------------------------------------------------------------------------------

    def _announce(self) -> None:
        if not self._dirty:
            return
        members = [p for p in self._peers.values() if p.linked and not p.doomed]
        if not members:
            return
        self._dirty = False
        self._generation += 1
        lost = set(self._world) - {p.id for p in members}
        gently = not lost and self._rng.random() < 0.5
        self._world = sorted(p.id for p in members)
        world = World.of(Generation(self._generation), [self._member(p) for p in members])
        self.tally.worlds += 1
        for peer in members:
            self._tell(peer, "edit", {"world": world.to_json(), "gently": gently})

    def _member(self, peer: _Peer) -> Member:
        assert peer.address is not None, "a peer that is linked has said where it listens"
        host, port = peer.address
        return Member(
            member=MemberId(peer.id), seat=Seat(peer.id), node=NodeId(0), host=host, port=port
        )

    def _invite(self, peer: _Peer) -> None:
        """Have a newcomer connect to those who are in the world, while they work."""
        living = [self._peers[i] for i in self._world if i in self._peers]
        others = [peer for peer in living if not peer.doomed]
        world = World.of(Generation(self._generation), [self._member(p) for p in others])
        self._tell(peer, "link", world.to_json())

    # -- what peers say -----------------------------------------------------------------------

    def _serve(self, patience_s: float) -> None:
        pipes = {p.pipe: p for p in self._peers.values()}
        for pipe in wait(list(pipes), timeout=min(max(patience_s, 0.0), 0.1)):
            peer = pipes[pipe]  # type: ignore[index]
            try:
                kind, value = peer.pipe.recv()
            except (EOFError, OSError):
                self._lose(peer, expected=peer.doomed)
                continue
            self._heard(peer, kind, value)

    def _heard(self, peer: _Peer, kind: str, value: Any) -> None:
        match kind:
            case "up":
                peer.address = value
                self._invite(peer)
            case "unlinked":
                self._invite(peer)
            case "linked":
                peer.linked = self._dirty = True
            case "entered":
                peer.entered = max(peer.entered, value)
            case "halted" if value[0] == self._generation and not peer.doomed:
                # A world that nobody was lost from: a member could not be reached, or a peer
                # says that one is gone before its pipe does.
                self._dirty = True
            case "settled":
                peer.settled = value
                self._note_settled(value)
            case "count":
                self.tally.operations.update(value)
            case "wrong":
                self.tally.wrong.append(str(value))

    def _note_settled(self, generation: int) -> None:
        if generation != self._generation:
            return
        members = [self._peers[i] for i in self._world if i in self._peers]
        if any(p.settled != generation for p in members):
            return
        self._progress = time.monotonic()
        self.tally.settled += 1
        self.tally.sizes[len(members)] += 1
        if self._killed_at is not None and not any(p.doomed for p in members):
            self.tally.repairs_s.append(self._progress - self._killed_at)
            self._killed_at = None

    def _lose(self, peer: _Peer, *, expected: bool) -> None:
        peer.process.kill()
        peer.process.join(10)
        peer.pipe.close()
        del self._peers[peer.id]
        if peer.id in self._world:
            self._dirty = True
        if not expected:
            self.tally.wrong.append(f"member {peer.id} left without having been asked")

    def _tell(self, peer: _Peer, kind: str, value: object = None) -> None:
        try:
            peer.pipe.send((kind, value))
        except OSError:
            pass  # it died this instant; its pipe says so next

    def _finish(self) -> None:
        """Have all peers close in order, and tell what they had not told."""
        for peer in self._peers.values():
            if not peer.frozen_until:
                self._tell(peer, "stop")
                peer.doomed = True
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(not p.frozen_until for p in self._peers.values()):
            self._serve(0.1)

    def _stuck(self) -> str:
        states = [(p.id, p.entered, p.settled, p.doomed) for p in self._peers.values()]
        return (
            f"no round of all members of generation {self._generation} was completed for "
            f"{STUCK_S:g} s; (member, entered, settled, doomed): {states}"
        )
