"""From what ranks leave in shared memory to verdicts with evidence."""
