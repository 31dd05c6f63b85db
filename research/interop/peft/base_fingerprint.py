"""What an adapter's file says of its base, so that another one is refused.

Two notes in the header of the file. One is a hash of sizes and norms, which
no quantizer packs; older files have it alone. The other holds a few numbers of
every norm and matrix in bfloat16: the same base in another format has them
again, but for an ulp where it was in float16, and roughly where it is packed.
"""

import functools
import hashlib
import json
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import tree, weights
from research.lora import wrap
from research.typing import Params, UserError

FINGERPRINT = "base_fingerprint"
SAMPLE = "base_sample"

COUNT = 8
"""How many numbers of a norm or matrix are noted."""

LEAST_COSINE = 0.7
"""Between samples of a base and of itself in two bits, or better; other
bases have 0, give or take one over the root of how many numbers there are."""

MOST_MOVED = 1 / 8
"""Share of unpacked numbers that may be an ulp of bfloat16 away: rounded to
float16 in between, one in 16 is."""


def header(params: Params, without: Collection[str] = ()) -> dict[str, str]:
  """Returns what to write of the base under the adapters in `params`.

  Args:
    without: addresses of weights that are no longer the base's.
  """
  base = wrap.disable(params)
  norms = {address for address, shape in _shapes(base) if len(shape) == 1}
  own = None if norms & set(without) else fingerprint(base)
  numbers = {a: x for a, x in sample(base).items() if a not in without}
  out = {FINGERPRINT: own} if own else {}
  if numbers:
    out[SAMPLE] = json.dumps(numbers, separators=(",", ":"))
  return out


def check(file: Any, name: Any, notes: Mapping[str, str], params: Params):
  """Raises UserError unless `params` can be the base that a file speaks of.

  Warns if matrices are those of the base rounded in another way, as the same
  adapter then makes another model.

  Args:
    notes: the file's; those of older files, or none, are checked as far
      as they go.
  """
  where = other_numbers(file, notes, params)
  if where is None:
    _warn_of_rounding(file, name, notes, params)
    return
  wanted = notes.get(FINGERPRINT)
  found = fingerprint(params) if wanted else None
  own = f", fingerprint {wanted[:12]}" if wanted else ""
  has = f"{found[:12]}: other numbers" if found else "other numbers"
  raise UserError(
    f"{file}: this adapter is for another base: {str(name)[:80]!r}{own}.\n"
    f"The model it is put on has {has} in {where}. Load it over its own base."
  )


def other_numbers(
  file: Any, notes: Mapping[str, str], params: Params
) -> str | None:
  """Returns where `params` cannot be the base that notes speak of, or None."""
  wanted = notes.get(FINGERPRINT)
  if SAMPLE in notes:
    theirs, ours = _read(file, notes[SAMPLE]), sample(wrap.disable(params))
    where = _other(theirs, ours)
    if where is None and wanted:
      where = _more(theirs, ours)
    # Rounded to float16 in between, its hash is another.
    return where
  found = fingerprint(params) if wanted else None
  return "its norms, or other sizes" if found and wanted != found else None


def _warn_of_rounding(file, name, notes, params: Params) -> None:
  """Warns of matrices that are the base's, but rounded in another way."""
  if SAMPLE not in notes:
    return
  theirs, ours = _read(file, notes[SAMPLE]), sample(wrap.disable(params))
  pairs = [
    (_numbers(x), _numbers(ours[a]))
    for a, x in theirs.items()
    if a in ours and "~" in x + ours[a]
  ]
  size = sum(np.sum(x**2) for x, _ in pairs)
  error = np.sqrt(sum(np.sum((y - x) ** 2) for x, y in pairs) / (size or 1))
  if error > 2**-7:  # an ulp of bfloat16, which the numbers are noted in
    warnings.warn(
      f"{file}: this adapter was trained over {str(name)[:80]!r} rounded in"
      f" another way than the base it is put on: their matrices differ by"
      f" {error:.1%} of their size, so its outputs are not those that its"
      " training measured.\nFor these, open the run that trained it.",
      RuntimeWarning,
      stacklevel=4,
    )


def fingerprint(params: Params) -> str | None:
  """Returns a hash of a base's sizes and norms, as hexadecimals.

  Norms are rounded to bfloat16, and embeddings and biases are left out, which
  adapters may bring. None for weights that are not here to be read.
  """
  lines = []
  for addresses, x, alone in _rows(wrap.disable(params)):
    shape = tuple(x.shape) if alone else tuple(x.shape[1:])
    lines += [f"{address} {list(shape)}" for address in addresses]
    if len(shape) == 1 and not weights.is_weight(x):
      if not _is_here(x):
        return None
      values = np.asarray(jnp.asarray(x).astype(jnp.bfloat16))
      each = [values] if alone else list(values)
      lines += [
        f"{address} {value.tobytes().hex()}"
        for address, value in zip(addresses, each, strict=True)
      ]
  return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def sample(base: Params) -> dict[str, str]:
  """Returns a few numbers of every norm and matrix, by address.

  As hexadecimals; embeddings and biases are left out, as adapters may bring
  them, and so is what is not here. Those of packed or 8-bit
  matrices follow a `~`.
  """
  out = {}
  for addresses, x, alone in _rows(base):
    if not _is_here(x):
      continue
    picked = np.asarray(_picked(x, alone)).reshape(len(addresses), -1)
    coarse = weights.is_weight(x) or x.dtype.itemsize < 2
    mark = "~" if coarse else ""
    out |= {
      address: mark + values.tobytes().hex()
      for address, values in zip(addresses, picked, strict=True)
    }
  return out


def _rows(base: Params) -> Iterator[tuple[list[str], Any, bool]]:
  """Yields (addresses, weight, whether it is no stack), embeddings apart."""
  for path, x in wrap.leaves(tree.outer_params(base)):
    if path not in ("embed", "head") and not path.endswith("bias"):
      yield [path], x, True
  for prefix, layers in tree.layer_indices(base).items():
    run, layer = prefix.split("/")
    for path, x in wrap.leaves(base[run][layer]):
      if not path.endswith("bias"):
        yield [f"layers/{i}/{path}" for i in layers], x, False


def _shapes(base: Params) -> Iterator[tuple[str, tuple[int, ...]]]:
  for addresses, x, alone in _rows(base):
    for address in addresses:
      yield address, tuple(x.shape) if alone else tuple(x.shape[1:])


def _is_here(x: Any) -> bool:
  return all(
    isinstance(part, np.ndarray)
    or (
      isinstance(part, jax.Array)
      and not isinstance(part, jax.core.Tracer)
      and part.is_fully_addressable
    )
    for part in jax.tree.leaves(x)
  )


def _places(shape: Sequence[int]) -> tuple[np.ndarray, ...]:
  """Returns indices of `COUNT` numbers, spread over all axes."""
  k = np.arange(COUNT) + 0.5
  steps = np.sqrt([2.0, 3.0, 5.0, 7.0][: len(shape)])
  return tuple(
    (k * step % 1 * size).astype(int)
    for step, size in zip(steps, shape, strict=True)
  )


def _picked(x: Any, alone: bool) -> Any:
  """Returns `[COUNT]` numbers of a matrix, or `[L, COUNT]` of a stack's."""
  if isinstance(x, np.ndarray):  # perhaps a file that is mapped: not whole
    where = _places(x.shape if alone else x.shape[1:])
    return x[where if alone else (slice(None), *where)].astype(jnp.bfloat16)
  return _picked_there(x, alone)


@functools.partial(jax.jit, static_argnames="alone")
def _picked_there(x: Any, alone: bool) -> Any:
  def one(x):
    return weights.dense(x)[_places(x.shape)].astype(jnp.bfloat16)

  if alone:
    return one(x)
  if weights.is_weight(x):
    return jax.lax.map(one, x)  # dense, they are too large for two
  return x[(slice(None), *_places(x.shape[1:]))].astype(jnp.bfloat16)


def _read(file: Any, text: str) -> dict[str, str]:
  try:
    found = json.loads(text)
    if all(len(_numbers(x)) == COUNT for x in found.values()):
      return found
  except (ValueError, AttributeError, TypeError, RecursionError):
    pass
  raise UserError(
    f"{file}: its note {SAMPLE} is damaged, expected {COUNT} numbers of each "
    "matrix.\nLoad an undamaged copy."
  )


def _numbers(text: str) -> np.ndarray:
  return np.frombuffer(
    bytes.fromhex(text.removeprefix("~")), jnp.bfloat16
  ).astype(np.float64)


def _other(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str | None:
  """Returns where, or in what, two bases differ; None where they do not."""
  missing = sorted(set(theirs) - set(ours))
  if missing:
    return missing[0] if ours else None  # or nothing of the base is here
  both = {a: (_numbers(x), _numbers(ours[a])) for a, x in theirs.items()}
  packed = {a for a in both if "~" in theirs[a] + ours[a]}
  moved = 0
  for address in sorted(set(both) - packed):
    x, y = both[address]
    # The last term is what float16 makes of numbers that are tiny.
    far = np.abs(x - y) > np.maximum(np.abs(x), np.abs(y)) * 2**-7 + 2**-23
    if far.any():
      return address
    moved += np.count_nonzero(x != y)
  if moved > MOST_MOVED * COUNT * len(both.keys() - packed):
    return "many matrices"
  pairs = [
    [x / (np.linalg.norm(x) or 1), y / (np.linalg.norm(y) or 1)]
    for x, y in (both[a] for a in packed)
  ]
  cosines = [float(x @ y) for x, y in pairs if x.any() or y.any()]
  if cosines and np.mean(cosines) < LEAST_COSINE:
    return "most matrices"
  return None


def _more(theirs: Collection[str], ours: Collection[str]) -> str | None:
  """Returns the first layer that only the model has; None for the same ones.

  Only for files with a fingerprint: without one, norms are replaced, perhaps
  with all else of a layer, of which nothing is noted then.
  """
  noted, found = (
    {a.split("/")[1] for a in x if a.startswith("layers/")}
    for x in (theirs, ours)
  )
  more = sorted(map(int, found - noted))
  return f"layers/{more[0]}, which its base has not" if more else None
