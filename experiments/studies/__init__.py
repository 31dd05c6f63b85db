"""Studies: arms, tasks and verdicts that run files name."""
