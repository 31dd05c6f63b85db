"""What the comparisons share."""

import numpy as np


def span(logits: np.ndarray) -> float:
  """Returns largest minus smallest."""
  return float(logits.max() - logits.min())


def relative_error(got, want) -> float:
  """Returns the largest difference over the range of `want`."""
  want = np.asarray(want, np.float64)
  return float(np.abs(np.asarray(got) - want).max() / span(want))


def assert_same_arrays(got: dict, want: dict, tolerance: float) -> None:
  """Integers equal; floats within `tolerance` of the array's largest value."""
  assert set(got) == set(want)
  for name, value in want.items():
    if np.issubdtype(value.dtype, np.floating):
      scale = max(float(np.abs(value).max()), 1e-30)
      error = float(np.abs(got[name] - value).max()) / scale
      assert error <= tolerance, f"{name}: {error:.1e}"
    else:
      np.testing.assert_array_equal(got[name], value, err_msg=name)
