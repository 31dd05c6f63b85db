"""Diagnoses adapters: norms, ranks, principal angles, intruder dimensions.

research/lora/MATH.md 8. Intruder dimensions: Shuttleworth et al. 2024
(arXiv:2410.21228), "LoRA vs Full Fine-tuning: An Illusion of Equivalence":
leading singular vectors of the adapted matrix that are similar to none of the
base's.

Singular vectors are eigenvectors of the smaller Gram matrix, in fp64
(`spectrum`), and updates of plain LoRA are decomposed by their factors.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from research import progress, tree, weights
from research.lora import lora_factors, to_lora, wrap
from research.lora.diagnosis import spectrum
from research.lora.to_lora import Energy
from research.typing import Params, UserError

Matrix = Float[np.ndarray, "I O"]


@dataclasses.dataclass(frozen=True)
class Diagnosis:
  """Measurements of one matrix `w [in, out]` and its update `d`.

  Attributes:
    relative: Frobenius norm of `d` over that of `w`.
    stable_rank: squared Frobenius norm over squared spectral norm of `d`.
    energy_rank: smallest rank with the given share of the squared norm of `d`.
    angles_in, angles_out: principal angles in radians, ascending, between the
      leading `energy_rank`-dimensional singular subspaces of `d` and `w`.
    cosines: for each leading output singular vector of `w + d`, its largest
      absolute cosine with any of `w`'s.
  """

  relative: float
  stable_rank: float
  energy_rank: int
  angles_in: Float[np.ndarray, " R"]
  angles_out: Float[np.ndarray, " R"]
  cosines: Float[np.ndarray, " T"]

  def intruders(self, threshold: float = 0.5) -> int:
    """Returns the number of leading vectors with a cosine below `threshold`."""
    return int((self.cosines < threshold).sum())


def diagnose(
  params: Params, top: int = 10, energy: float = 0.9
) -> dict[str, Diagnosis]:
  """Returns the diagnosis of every adapted matrix, of each expert separately.

  Args:
    top: number of leading singular vectors to test for intruders.
    energy: share of the squared norm for `energy_rank`.

  Returns:
    address -> diagnosis; experts are `address[k]`.

  Raises:
    UserError: there is no adapter, or an argument is out of range.
  """
  size, out = Energy(_checked(top, energy)), {}
  for path, w, update in _updates(params):
    out[path] = _diagnosis(w, update, top, size)
  if not out:
    raise UserError("these parameters hold no adapter")
  return out


def diagnose_change(
  before: Params, after: Params, top: int = 10, energy: float = 0.9
) -> dict[str, Diagnosis]:
  """Returns the diagnosis of what full training did to the layers' matrices.

  Args:
    before, after: parameters of the same model, without adapters.
    top, energy: as for `diagnose`.

  Returns:
    address -> diagnosis; experts are `address[k]`.

  Raises:
    UserError: the models differ, or an argument is out of range.
  """
  size, out = Energy(_checked(top, energy)), {}
  pairs = zip(tree.layers(before), tree.layers(after), strict=False)
  for i, (first, last) in enumerate(pairs):
    trained = dict(wrap.leaves(last))
    for path, leaf in wrap.leaves(first):
      trained_leaf = trained.get(path)
      shape = getattr(trained_leaf, "shape", None)
      if shape != leaf.shape:
        raise UserError(
          f"layers/{i}/{path}: found {shape}"
          f" after training, expected {leaf.shape} as in --base"
        )
      w, now = (
        np.asarray(weights.dense(x)).astype(np.float32)
        for x in (leaf, trained_leaf)
      )
      for k in np.ndindex(*w.shape[:-2]) if w.ndim > 1 else ():
        update = spectrum.decompose(now[k] - w[k])
        name = f"layers/{i}/{path}" + "".join(f"[{j}]" for j in k)
        out[name] = _diagnosis(w[k], update, top, size)
  return out


def _checked(top: int, energy: float) -> float:
  if top < 1:
    raise UserError(f"top is {top}, expected at least 1")
  return energy


def _updates(
  params: Params,
) -> Iterator[tuple[str, Matrix, lora_factors.Triple]]:
  """Yields the address, base and decomposed update of each matrix."""
  adapters = lora_factors.adapters(params)
  for path, t in progress.track(adapters.items(), "diagnosing matrices"):
    w, thin = lora_factors.base(t), to_lora.thin_svd_of(path, t)
    dense = None if thin is not None else lora_factors.update(t)
    for k in np.ndindex(*w.shape[:-2]):  # once, or for each expert
      if dense is not None:
        u, s, v = spectrum.decompose(dense[k])
      else:
        u, s, v = (x[k] for x in thin)
      yield path + "".join(f"[{i}]" for i in k), w[k], (u, s, v)


def _diagnosis(
  w: Matrix, update: lora_factors.Triple, top: int, energy: Energy
) -> Diagnosis:
  u, s, v = update
  x, _, y = spectrum.decompose(w)
  none = not s.any()
  rank = 0 if none else energy.rank_of(s)
  changed = spectrum.decompose(w + (u * s) @ v, top)[2]
  return Diagnosis(
    relative=float(np.linalg.norm(s) / np.linalg.norm(w)),
    stable_rank=0.0 if none else float(((s / s[0]) ** 2).sum()),
    energy_rank=rank,
    angles_in=_angles(u[:, :rank].T, x[:, :rank].T),
    angles_out=_angles(v[:rank], y[:rank]),
    cosines=_cosines(changed, y),
  )


def _angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  if not len(a):
    return np.zeros(0, np.float32)
  cosines = np.linalg.svd(a @ b.T, compute_uv=False)
  return np.arccos(np.clip(cosines, 0, 1))


def _cosines(changed: np.ndarray, base: np.ndarray) -> np.ndarray:
  return np.abs(changed @ base.T).max(1, initial=0.0)


def mitigate(
  params: Params,
  top: int = 10,
  threshold: float = 0.5,
  strength: float = 0.75,
) -> tuple[dict[str, lora_factors.Factors], dict[str, int]]:
  """Returns LoRA factors with attenuated intruder dimensions, and their counts.

  PEFT's `reduce_intruder_dimension`: scales each intruder of `w + d` by
  `strength` and factors the update again at its rank and scale. Matrices
  without intruders keep their factors.

  Args:
    params: parameters with plain LoRA adapters.
    top, threshold: define intruders, see `diagnose` and `Diagnosis.intruders`.
    strength: factor of intruders; 1 changes nothing, 0 removes them.

  Returns:
    (address -> factors, address -> number of intruders).

  Raises:
    UserError: `strength` is not in [0, 1], or a weight is a stack of experts.
  """
  if not 0 <= strength <= 1:
    raise UserError(f"strength is {strength}, expected from 0 to 1")
  factors, tensors = lora_factors.factors(params), lora_factors.adapters(params)
  out, counts = {}, {}
  for path, f in progress.track(factors.items(), "reducing intruders"):
    w = lora_factors.base(tensors[path])
    if w.ndim > 2:
      raise UserError(
        f"{path}: found stacked experts, expected matrices: intruders of "
        "experts cannot be reduced"
      )
    u, s, v = spectrum.decompose(w + f.delta(), top)
    base = spectrum.decompose(w)[2]
    rows = np.flatnonzero(_cosines(v, base) < threshold)
    counts[path] = len(rows)
    out[path] = f
    if len(rows):
      less = (strength - 1) / f.scale * s[rows, None]
      out[path] = _refactored(f, u[:, rows].T, less * v[rows])
  return out, counts


def _refactored(
  f: lora_factors.Factors, more_in: np.ndarray, more_out: np.ndarray
) -> lora_factors.Factors:
  """Returns factors of `f` and more terms, truncated to the rank of `f`.

  Args:
    more_in, more_out: factors `[n, in]`, `[n, out]` of what is added, to be
      multiplied by the scale of `f`.
  """
  a, b = np.concatenate([f.a, more_in]), np.concatenate([f.b, more_out])
  u, s, v = lora_factors.thin_svd(a, b)
  root = np.sqrt(s[: f.rank])[:, None]
  a, b = root * u[:, : f.rank].T, root * v[: f.rank]
  return lora_factors.Factors(
    a.astype(np.float32), b.astype(np.float32), f.scale
  )
