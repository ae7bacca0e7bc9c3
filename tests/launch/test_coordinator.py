"""The coordinator takes in what agents report, whatever it has kept of the reports before."""

import json
from random import Random

from ftkit.core.ids import MemberId, NodeId, Seat
from ftkit.launch.config import JobConfig
from ftkit.launch.coordinator import Coordinator
from ftkit.recovery.facts import MemberFacts, Stage


def test_members_that_are_told_as_before_are_not_read_again_and_never_mistaken(tmp_path) -> None:
    """Whatever is told in whatever order, by an agent of an earlier life or another node."""
    chance, node = Random(3), NodeId(0)
    (tmp_path / "events").mkdir()
    config = JobConfig(job="j", command=("true",), run_dir=str(tmp_path))
    leads = Coordinator(config, "00" * 16, [("h", 1)], number=1)
    known = [
        MemberFacts(member=MemberId(n), seat=Seat(n % 3), node=node, stage=stage).to_json()
        for n in range(4)
        for stage in (Stage.READY, Stage.ACTIVE)
    ]
    for turn in range(300):
        told = json.loads(json.dumps(chance.choices(known, k=chance.choice([3, 3, 3, 2]))))
        report = {"boot": str(turn // 7), "members": told, "rows": [], "at": 1.0 + turn}
        leads._take_facts(node, report)
        assert leads._told[node] == [MemberFacts.from_json(m) for m in told]
        newest = {int(m["member"]): MemberFacts.from_json(m) for m in told}
        assert newest.items() <= {int(m): f for m, f in leads._members.items()}.items()
    leads._disk.close()
    leads._incidents.close()
    leads.trace.close()
