"""Studies of process reward models, judged against people's labels."""
