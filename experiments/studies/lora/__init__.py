"""Studies of adapters."""
