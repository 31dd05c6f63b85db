"""Bits a weight within which rows compete."""

BANDS = ((4.25, 4.5), (3.25, 3.5))
"""Bits a weight within which rows compete, both ends included."""


def band(bits: float | None) -> tuple[float, float] | None:
  """Returns the band that a number of bits, to a hundredth, lies in."""
  if bits is None:
    return None
  found = [b for b in BANDS if b[0] <= round(bits, 2) <= b[1]]
  return found[0] if found else None
