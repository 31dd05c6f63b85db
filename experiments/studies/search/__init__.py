"""Studies of searches: what thinking longer buys, and what it costs."""
