"""Studies of attention kernels."""
