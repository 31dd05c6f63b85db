"""Sizes that are rounded up, so that calls share few compiled programs."""


def next_power_of_two(n: int) -> int:
  """Returns the least power of two that is no less than `n`; 1 below 1."""
  return 1 << max(n - 1, 0).bit_length()
