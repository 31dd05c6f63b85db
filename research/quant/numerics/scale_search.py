"""ggml's searches for scales of groups (k-quants), vectorised in NumPy.

Arrays are float32 `[..., n, N]`: `n` weights of a group, and N groups along the
last axis, at least two. Sums run in the order of the group and nothing is
fused, so results equal bit for bit those of the C reference, compiled without
contraction of products and sums (FMA).

Each search computes integer codes from a trial scale, solves for the best scale
for these codes (weighted least squares), and keeps the best trial.
"""

import numpy as np

F = np.float32
EMPTY = F(1e-15)
"""A group with a smaller largest magnitude gets scale 0."""


def total(x: np.ndarray) -> np.ndarray:
  """Returns the sum over a group, in the order of its elements."""
  return np.add.reduce(x, axis=-2)


def extreme(x: np.ndarray) -> np.ndarray:
  """Returns the signed value of largest magnitude, the first of ties."""
  high, low = x.max(-2), x.min(-2)
  found = np.where(high >= -low, high, low)
  tied = (high == -low) & (high > 0)
  if tied.any():
    first = np.abs(x).argmax(-2)[..., None, :]
    first = np.take_along_axis(x, first, -2)[..., 0, :]
    found = np.where(tied, first, found)
  return found


def codes_of(
  x: np.ndarray, inverse: np.ndarray, low: int, top: int
) -> np.ndarray:
  """Returns `clip(round(inverse x), low, top)`, float32; halves to even."""
  codes = x * inverse[..., None, :]
  np.rint(codes, out=codes)
  np.maximum(codes, F(low), out=codes)
  return np.minimum(codes, F(top), out=codes)


def ratio(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Returns `x / y`, and 0 where y is not positive."""
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(y > 0, x / y, F(0))


def symmetric(
  x: np.ndarray, top: int, weight: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
  """Fits `x ~ scale (code - top)`; returns (scale, codes).

  The first trial maps the value of largest magnitude to `-top`, 18 more trials
  to up to 0.9 on either side. The scale has the opposite sign of that value.

  Args:
    x: `[..., n, N]`.
    top: codes are 0 to 2 top - 1.
    weight: weight of squared errors, broadcastable to `x`; `x**2` if None.

  Returns:
    scale `[..., N]`; codes as `x`, uint8; both 0 for groups of zeros.
  """
  weight = x * x if weight is None else weight
  most = extreme(x)
  empty = np.abs(most) < EMPTY
  most = np.where(empty, F(1), most)
  wx = weight * x

  def fitted(inverse):
    codes = codes_of(x, inverse, -top, top - 1)
    found = total(wx * codes)
    squares = weight * codes
    return found, total(np.multiply(squares, codes, out=squares))

  chosen = F(-top) / most
  xl, ll = fitted(chosen)
  scale = ratio(xl, ll)
  best = scale * xl
  for step in (*range(-9, 0), *range(1, 10)):
    inverse = -(F(top) + F(0.1) * F(step)) / most
    xl, ll = fitted(inverse)
    better = (ll > 0) & (xl * xl > best * ll)
    scale = np.where(better, ratio(xl, ll), scale)
    best = np.where(better, scale * xl, best)
    chosen = np.where(better, inverse, chosen)
  codes = (codes_of(x, chosen, -top, top - 1) + F(top)).astype(np.uint8)
  empty_codes = np.broadcast_to(empty[..., None, :], codes.shape)
  codes[empty_codes] = 0
  return np.where(empty, F(0), scale), codes


def affine(
  x: np.ndarray,
  weight: np.ndarray,
  top: int,
  trials: tuple[float, float, int],
  absolute: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Fits `x ~ scale code - drop`, drop >= 0; returns (scale, drop, codes).

  Args:
    x: `[..., n, N]`.
    weight: weight of errors, as `x`.
    trials: (first, step, count): trial `k` of 0 to count maps the range to
      `top + first + step k` codes.
    absolute: whether to compare trials by absolute rather than squared errors.

  Returns:
    scale, drop `[..., N]`; codes as `x`, uint8.
  """
  shift, high = np.minimum(x.min(-2), F(0)), x.max(-2)
  flat = high == shift
  high = np.where(flat, shift + F(1), high)
  w, wx = total(weight), total(weight * x)

  def coded(inverse, low):
    return codes_of(x - low[..., None, :], inverse, 0, top)

  def error(codes, scale, shift):
    off = codes * scale[..., None, :]
    off += shift[..., None, :]
    off -= x
    off = np.abs(off, out=off) if absolute else np.multiply(off, off, out=off)
    return total(np.multiply(off, weight, out=off))

  chosen, low = F(top) / (high - shift), shift
  scale = F(1) / chosen
  best = error(coded(chosen, low), scale, shift)
  first, step, count = trials
  for k in range(count + 1):
    # Relative to the best offset so far, as in the reference.
    inverse = ((F(first) + F(step) * F(k)) + F(top)) / (high - shift)
    codes = coded(inverse, shift)
    wl = weight * codes
    l, ll = total(wl), total(wl * codes)
    xl = total(np.multiply(wl, x, out=wl))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
      det = w * ll - l * l
      try_scale = (w * xl - wx * l) / det
      try_shift = (ll * wx - l * xl) / det
      up = try_shift > 0
      try_scale = np.where(up, xl / ll, try_scale)
      try_shift = np.where(up, F(0), try_shift)
      found = error(codes, try_scale, try_shift)
      better = (det > 0) & (found < best)
    best = np.where(better, found, best)
    chosen, low = np.where(better, (inverse, shift), (chosen, low))
    scale = np.where(better, try_scale, scale)
    shift = np.where(better, try_shift, shift)
  # A constant group is its offset alone.
  codes = coded(chosen, low).astype(np.uint8)
  return np.where(flat, F(0), scale), -shift, codes


def _descent(x, weight, codes, low, top, positive):
  """Coordinate descent over codes, up to five sweeps; returns (scale, codes).

  Modifies `codes`, float32 as `x`, in place. With `positive` a code is tried
  only if the weighted sum of squares of the other codes is positive, too.
  """
  wx = weight * x
  xl, ll = total(wx * codes), total(weight * codes * codes)
  for _ in range(5):
    changed = False
    for i in range(x.shape[-2]):
      at = (..., i, slice(None))
      now = codes[at]
      rest, squares = xl - wx[at] * now, ll - weight[at] * now * now
      ok = (rest > 0) & (squares > 0) if positive else rest > 0
      with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        new = np.rint(x[at] * squares / rest)
      new = np.minimum(np.maximum(new, F(low)), F(top))
      new = np.where(ok, new, now)
      rest, squares = rest + wx[at] * new, squares + weight[at] * new * new
      better = ok & (new != now) & (squares > 0)
      better &= rest * rest * ll > xl * xl * squares
      if better.any():
        changed = True
        codes[at] = np.where(better, new, now)
        xl, ll = np.where(better, rest, xl), np.where(better, squares, ll)
    if not changed:
      break
  return ratio(xl, ll), codes


def coordinate_descent(
  x: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
  """Fits as `symmetric` does, by coordinate descent over codes.

  Args:
    x: `[..., n, N]`; errors are weighted by `x**2`.
    top: codes are 0 to 2 top - 1.
  """
  most = extreme(x)
  empty = np.abs(most) < EMPTY
  codes = codes_of(x, F(-top) / np.where(empty, F(1), most), -top, top - 1)
  scale, codes = _descent(x, x * x, codes, -top, top - 1, False)
  codes = (codes + F(top)).astype(np.uint8)
  codes[np.broadcast_to(empty[..., None, :], codes.shape)] = 0
  return np.where(empty, F(0), scale), codes


def positive(
  x: np.ndarray, weight: np.ndarray, top: int
) -> tuple[np.ndarray, np.ndarray]:
  """Fits `x ~ scale code` for nonnegative x; returns (scale, codes).

  Args:
    x, weight: `[..., n, N]`.
  """
  most = np.maximum(x.max(-2), F(0))
  empty = most < EMPTY
  most = np.where(empty, F(1), most)

  def error(inverse):
    off = x - (F(1) / inverse)[..., None, :] * codes_of(x, inverse, 0, top)
    return total(weight * off * off)

  chosen = F(top) / most
  best = error(chosen)
  for step in (*range(-4, 0), *range(1, 5)):
    inverse = (F(0.1) * F(step) + F(top)) / most
    found = error(inverse)
    better = found < best
    best = np.where(better, found, best)
    chosen = np.where(better, inverse, chosen)
  codes = codes_of(x, chosen, 0, top)
  scale, codes = _descent(x, weight, codes, 0, top, True)
  codes = codes.astype(np.uint8)
  codes[np.broadcast_to(empty[..., None, :], codes.shape)] = 0
  return np.where(empty, F(0), scale), codes
