"""From verdicts to a running job: protocol, policy, budget, data cursor."""
