"""A job in which bits flip between two steps, and which looks for them; `mode` says how."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import ftkit
from ftkit.collectives.shared_state import SharedState
from ftkit.collectives.state_vote import Strategy, Tie
from ftkit.core.errors import StateRefused
from tests.drills.training import Curve, build, digest

#: Long enough for a rank that was lost to be back.
STEPS = 120
#: At the first a bit flips on one rank, at the second another on each; the third is calm.
LOOKS = (4, 8, 12)


def flip(tensor: torch.Tensor, at: int) -> None:
    tensor.detach().reshape(-1).view(torch.uint8)[at] ^= 4


def die_in_repair(shared: SharedState, revision: int) -> None:
    """Die when all are in the repair: that they vote on it shows that they are."""
    statement = shared._statement(Strategy.POPULAR, revision, shared.revision)
    shared._vote(statement, Tie.REFUSE, None)
    os.kill(os.getpid(), signal.SIGKILL)


def look(session: Any) -> list[Any]:
    """Verify and repair; what was found, if anything."""
    try:
        found = session.verify(repair=True)
    except StateRefused as refused:
        found = replace(session.verify(), refusal=f"refused: {refused}")
    if found.equal or found.unknown:
        return []
    return [
        {
            "step": found.step,
            "damaged": [(d.rank, d.seat, d.tensor) for d in found.damaged],
            "undecided": found.undecided,
            "repaired": found.repaired,
            "refusal": found.refusal,
        }
    ]


def main(mode: str) -> None:
    torch.set_num_threads(1)
    session = ftkit.init()
    model = build(64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=False)
    session.protect(model=model, optimizer=optimizer)
    first_life = os.environ["FTKIT_MEMBER"] == os.environ["FTKIT_SEAT"]
    weight = next(model.parameters())
    seen: list[Any] = []
    for step in session.steps(Curve(), slots=6, slot_size=4, until=STEPS):
        with step:
            for x, y in step.batches():
                nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        if step.index in LOOKS:
            if step.index == LOOKS[0] and mode != "calm" and session.seat == 1:
                flip(weight, 7)
                flip(optimizer.state[weight]["exp_avg"], 11)
            if step.index == LOOKS[0] and mode == "cut" and session.seat == 2 and first_life:
                SharedState.sync = die_in_repair  # type: ignore[method-assign,assignment]
            if step.index == LOOKS[1] and mode == "flips":
                flip(weight, session.seat)
            seen += look(session)
            if step.index == LOOKS[1] and mode == "flips":
                flip(weight, session.seat)
        if session.world_size < int(os.environ["WORLD_SIZE"]):
            time.sleep(0.1)
    moments = [s["exp_avg"] for s in optimizer.state.values()]
    session.trace.event(
        "final",
        params=digest(model.state_dict(), {str(i): m for i, m in enumerate(moments)}),
        loss=None,
        seen=json.dumps(seen),
    )


if __name__ == "__main__":
    main(sys.argv[1])
