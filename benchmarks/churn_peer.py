"""A peer of the churn soak: rounds of concurrent, checked operations, in world after world.

It is told of worlds by its host through a pipe and moves to them; everything else it learns
from its Group. It says what happened: `up`, `linked`, `entered`, `halted`, `count`, `wrong`.
"""

import os
import random
import threading
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.churn_ops import ANYWHERE, OF_THE_WORLD, Issued, Place
from ftkit.collectives.group import Group
from ftkit.collectives.shared_state import SharedState
from ftkit.collectives.state_vote import Tie
from ftkit.core.errors import GenerationAborted, WireError
from ftkit.core.ids import Generation, MemberId
from ftkit.core.world import World

#: Nothing takes so long unless it hangs.
HANG_S = 60.0
COUNT_S = 0.25


class Wrong(Exception):
    """A result is not what it must be, or something hangs. Ends the soak."""


class Peer:
    """See the module."""

    def __init__(self, member: int, secret: bytes, seed: int, pipe: Connection) -> None:
        self._pipe = pipe
        self._saying = threading.Lock()
        self._seed = seed
        self._changed = threading.Condition()
        self._world: World | None = None
        self._gently = False
        self._stop = False
        self._counts: Counter[str] = Counter()
        self._counted = time.monotonic()
        self._group = Group(
            member=MemberId(member), secret=secret, on_fault=lambda *_: self._wake()
        )
        self.say("up", self._group.address)

    def say(self, kind: str, value: object = None) -> None:
        """Tell the host; a host that is gone ends this process."""
        with self._saying:
            try:
                self._pipe.send((kind, value))
            except OSError:
                os._exit(0)

    def listen(self) -> None:
        """(thread) Take what the host says, until it is gone."""
        while True:
            try:
                kind, value = self._pipe.recv()
            except (EOFError, OSError):
                os._exit(0)
            match kind:
                case "link":
                    threading.Thread(target=self._link, args=(value,), daemon=True).start()
                case "edit":
                    self._take(World.from_json(value["world"]), gently=value["gently"])
                case "stop":
                    with self._changed:
                        self._stop = True
                        self._changed.notify_all()
                    self._group.abort(self._group.world.generation, "the soak is over")

    def _link(self, told: Any) -> None:
        world = World.from_json(told)
        try:
            self._group.connect(world.members, timeout_s=5)
        except WireError as error:
            self.say("unlinked", str(error))
        else:
            self.say("linked", world.generation)

    def _take(self, world: World, *, gently: bool) -> None:
        with self._changed:
            if self._world is not None and world.generation <= self._world.generation:
                return
            self._world, self._gently = world, gently
            self._changed.notify_all()
        if not gently:
            # Also ends an edit to a world that will never stand.
            for generation in range(self._group.world.generation, world.generation):
                self._group.abort(Generation(generation), f"the world moves to {world.generation}")

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # -- the training thread, as it were -------------------------------------------------------

    def run(self) -> None:
        """Until the host says stop."""
        while not self._stop:
            world = self._next_world()
            if world is None:
                break
            try:
                self._group.edit(world, timeout_s=20)
            except (WireError, GenerationAborted) as error:
                self._group.abort(world.generation, str(error))
                self.say("halted", (world.generation, str(error)))
                continue
            self.say("entered", world.generation)
            try:
                self._play(world)
            except GenerationAborted as error:
                self.say("halted", (world.generation, str(error)))
        self._tell_counts()
        self._group.close()
        self.say("done")

    def _next_world(self) -> World | None:
        with self._changed:
            while not self._stop:
                if self._world and self._world.generation > self._group.world.generation:
                    return self._world
                if not self._changed.wait(HANG_S):
                    raise Wrong(f"no world came for {HANG_S} s")
        return None

    def _play(self, world: World) -> None:
        """Rounds in one world, until it ends or all agree to go to the next."""
        group = self._group
        rank, size = group.rank, group.size
        everybody = Place(group, group.channel, rank, size)
        some = tuple(m.member for m in world.members[:: 2 if size > 2 else 1])
        half = None
        if group.member in some:
            channel = group.subset(1000 + world.generation % 1000, some)
            half = Place(group, channel, channel.rank, channel.size)
        number = 0
        while not self._stop:
            if self._agreed_to_move():
                return
            # The same on every rank: what is played follows from seed, world and round.
            rng = random.Random(f"{self._seed} {world.generation} {number}")
            salt = rng.randrange(1 << 20)
            issued: list[Issued] = []
            for turn in range(rng.randint(2, 6)):
                operation = rng.choice((*OF_THE_WORLD, *ANYWHERE))
                # In any case drawn, so that ranks outside the half stay in step.
                inner = random.Random(rng.random())
                if rng.random() < 0.3 and operation in ANYWHERE:
                    if half is not None:
                        issued.append(operation(half, inner, salt + turn))
                else:
                    issued.append(operation(everybody, inner, salt + turn))
            self._await(issued, f"generation {world.generation}, round {number}")
            if number % 5 == 4:
                self._share(salt)
            if number == 0:
                self.say("settled", world.generation)
            number += 1
            self._count()
        if half is not None:
            group.release(half.channel)

    def _await(self, issued: list[Issued], where: str) -> None:
        for name, handle, check in issued:
            try:
                handle.wait(HANG_S)
                wrong = check()
            except TimeoutError:
                raise Wrong(f"{where}: {name} hangs") from None
            except GenerationAborted:
                self._counts["cut short"] += 1
                raise
            if wrong:
                raise Wrong(f"{where}: {name}: {wrong}")
            self._counts[name.split()[0]] += 1

    def _share(self, salt: int) -> None:
        """One rank's tensors are spoilt, and mended by the others."""
        group = self._group
        good = {"a": torch.arange(5000) + salt, "b": torch.full((3, 7), float(salt % 100))}
        mine = {name: tensor.clone() for name, tensor in good.items()}
        spoilt = salt % group.size
        if group.rank == spoilt:
            mine["a"][salt % 5000] += 1
        report = SharedState(group, mine).sync(salt, tie=Tie.LOWEST_RANK, timeout_s=HANG_S)
        if group.size > 2:
            named = [(d.rank, d.tensor) for d in report.differences]
            if named != [(spoilt, "a")] or not mine["a"].equal(good["a"]):
                raise Wrong(f"shared state: rank {spoilt} was spoilt, {named} were named")
        self._counts["shared_state"] += 1

    def _agreed_to_move(self) -> bool:
        """Whether every rank knows of the next world: then all leave this one together."""
        with self._changed:
            known = self._world.generation if self._world and self._gently else 0
        said = self._group.exchange(known.to_bytes(8, "big")).wait(HANG_S)
        return min(int.from_bytes(b, "big") for b in said) > self._group.world.generation

    def _count(self) -> None:
        if time.monotonic() - self._counted > COUNT_S:
            self._tell_counts()

    def _tell_counts(self) -> None:
        self._counted = time.monotonic()
        self.say("count", dict(self._counts))
        self._counts.clear()


def main(member: int, secret: bytes, seed: int, pipe: Connection) -> None:
    """(process) One peer, from its start to its end."""
    torch.set_num_threads(1)
    peer = Peer(member, secret, seed, pipe)
    threading.Thread(target=peer.listen, daemon=True).start()
    try:
        peer.run()
    except BaseException as error:  # noqa: BLE001 - the host shows whatever it was
        peer.say("wrong", f"member {member}: {error}\n{traceback.format_exc()}{_stacks()}")
        time.sleep(1)
    os._exit(0)


def _stacks() -> str:
    import sys

    names = {t.ident: t.name for t in threading.enumerate()}
    return "".join(
        f"-- {names.get(ident, ident)}\n{''.join(traceback.format_stack(frame)[-4:])}"
        for ident, frame in sys._current_frames().items()
    )
