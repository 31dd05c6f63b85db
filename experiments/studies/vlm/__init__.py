"""Studies of vision language models: arms, tasks and verdicts."""
