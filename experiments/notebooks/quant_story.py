"""What `colab/quantization.ipynb` shows: few bits, from a histogram to a file.

Numbers are those of a real model's matrices and of what they multiply.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from research import tree, weights
from research.interop.loaded import Loaded
from research.quant.algorithms import calibrate, gptq
from research.quant.format import Format
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.ggml import GGML
from research.quant.formats.iq4 import IQ4NL
from research.quant.formats.microscaling import Microscaling
from research.quant.formats.nvfp4 import NVFP4
from research.quant.numerics import codebooks, hadamard
from research.quant.quantize import Quantize
from research.quant.reports import compare, input_errors, report_errors
from research.training.reports import plots
from research.typing import Array, Float, Int, Params

Rows = list[dict[str, Any]]
"""Lines of a table."""


def histogram(w: Float[Array, "I O"], block: int = 64) -> Any:
  """Returns a figure: weights over the largest of their block, and two grids.

  Args:
    w: a matrix; blocks are neighbouring inputs of one output.
    block: weights that share a scale.
  """
  groups = np.asarray(w, np.float64).T.reshape(-1, block)
  top = np.abs(groups).max(1, keepdims=True)
  unit = (groups / np.where(top == 0, 1, top)).ravel()
  inside = unit[np.abs(unit) < 1]  # the largest are 1 by definition
  figure, axes = plt.subplots(2, 1, figsize=(9, 4.6), sharex=True)
  grids = {"NF4": codebooks.table("nf4"), "even": np.linspace(-1, 1, 16)}
  for axis, (name, levels) in zip(axes, grids.items(), strict=True):
    axis.hist(inside, 200, color="0.75")
    used = np.abs(unit[:, None] - levels).argmin(1)
    share = np.bincount(used, minlength=len(levels)) / len(unit)
    entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
    axis.vlines(levels, 0, axis.get_ylim()[1], plots.COLORS[0], linewidth=1)
    axis.set(
      yticks=[], title=f"{name}: its 4 bits carry {entropy:.2f}", ylabel=name
    )
  axes[-1].set(xlabel="weight / largest of its block")
  return figure


def formats(
  x: Float[Array, "M I"], w: Float[Array, "I O"], some: Sequence[Format]
) -> Rows:
  """Returns a line a format: bits, and relative errors of one matrix."""
  want = x @ w
  out = []
  for format in some:
    packed = Quantize(format=format).pack(w)
    got = jnp.asarray(packed.dense())
    error = jnp.linalg.norm(got - w) / jnp.linalg.norm(w)
    out.append(
      {
        "format": format.name,
        "bits": packed.bits_per_weight,
        "weights' error": float(error),
        "outputs' error": float(input_errors.median_error(x @ got, want)),
      }
    )
  return sorted(out, key=lambda row: -row["bits"])


def against_bits(rows: Rows) -> Any:
  """Returns a figure of the outputs' errors against true bits a weight."""
  figure, axis = plt.subplots(figsize=(8, 4.5))
  bits = np.array([row["bits"] for row in rows])
  error = np.array([row["outputs' error"] for row in rows])
  axis.semilogy(bits, error, "o")
  for row in rows:
    place = row["bits"], row["outputs' error"]
    axis.annotate(
      row["format"], place, (4, 3), textcoords="offset points", fontsize=8
    )
  line = np.linspace(bits.min(), bits.max(), 2)
  through = np.exp(np.mean(np.log(error) + bits * np.log(2)))
  label = "half the error for a bit more"
  axis.semilogy(line, through * 2.0**-line, "0.7", zorder=0, label=label)
  axis.set(xlabel="bits a weight, scales counted", ylabel="outputs' error")
  axis.legend(frameon=False)
  return figure


@dataclasses.dataclass(frozen=True)
class Steps:
  """GPTQ of a matrix, row after row.

  Attributes:
    nearest, gptq: `[I]`, the outputs' squared error over their squared size
      when that many rows are rounded and the others are as they are by then.
    before, after: the matrix, and what the library made of it.
    textbook: what the steps here made of it.
  """

  nearest: np.ndarray
  gptq: np.ndarray
  before: np.ndarray
  after: np.ndarray
  textbook: np.ndarray


def gptq_steps(
  x: Float[Array, "M I"], w: Float[Array, "I O"], bits: int = 3
) -> Steps:
  """Returns GPTQ as its paper has it, beside the library's.

  Frantar et al. 2022 (arXiv:2210.17323): row i is rounded, and what that did to
  the outputs is taken off the rows after it, along the Cholesky factor of the
  inverse Hessian. One scale and zero an output, rows in their order.

  Args:
    x: inputs, one row a token; more of them than `w` has rows.
  """
  format = Affine(bits=bits, block=w.shape[0])
  options = gptq.GPTQ(order="natural", grids="static", dead="round")
  h = jnp.asarray(x).T @ x
  given = gptq.prepare(jnp.asarray(w), h, format.block, options)
  grid = format.grid(given.w.reshape(1, format.block, -1))
  found = gptq.quantize(given, format, options, grid)
  whole = jax.jit(lambda w: format.values(format.codes(w[None], *grid), *grid))

  u = np.asarray(given.u, np.float64)
  hessian = np.asarray(h, np.float64)
  first = np.asarray(given.w, np.float64)
  near = np.asarray(whole(jnp.asarray(first, jnp.float32))[0], np.float64)
  size = np.einsum("io,ij,jo->", first, hessian, first)

  def error(now: np.ndarray) -> float:
    change = now - first
    return float(np.einsum("io,ij,jo->", change, hessian, change) / size)

  now, plain = first.copy(), first.copy()
  lost: dict[str, list[float]] = {"nearest": [], "gptq": []}
  for i in range(len(now)):
    rounded = np.asarray(whole(jnp.asarray(now, jnp.float32))[0, i], np.float64)
    mistake = (now[i] - rounded) / u[i, i]
    now[i + 1 :] -= np.outer(u[i, i + 1 :], mistake)
    now[i], plain[i] = rounded, near[i]
    lost["gptq"].append(error(now))
    lost["nearest"].append(error(plain))
  codes = found.codes.reshape(1, *w.shape)
  after = np.asarray(format.values(codes, *found.grid)[0], np.float64)
  curves = {name: np.asarray(found) for name, found in lost.items()}
  return Steps(before=first, after=after, textbook=now, **curves)


def gptq_picture(steps: Steps) -> Any:
  """Returns a figure: the error as rows are rounded, and what moved."""
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 4), width_ratios=(3, 2)
  )
  count = np.arange(1, len(steps.gptq) + 1)
  left.semilogy(count, steps.nearest, label="to nearest")
  left.semilogy(count, steps.gptq, label="GPTQ")
  left.set(xlabel="rows rounded", ylabel="squared error of the outputs")
  left.legend(frameon=False)
  moved = steps.textbook - steps.before
  limit = np.abs(moved).max()
  right.imshow(
    moved[:, :48].T, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto"
  )
  right.set(xlabel="row", ylabel="output", title="rounded minus before")
  return figure


def turned(x: Float[Array, "M I"], w: Float[Array, "I O"]) -> tuple[Any, Rows]:
  """Returns inputs before and after a random rotation, drawn, and errors."""
  key = jax.random.key(0)
  signs = jax.random.rademacher(key, (x.shape[-1],), jnp.float32)
  both = {"as they are": x, "rotated": hadamard.rotate(x * signs)}
  figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True)
  for axis, (name, some) in zip(axes, both.items(), strict=True):
    size = np.sort(np.abs(np.asarray(some)), axis=-1)[:, ::-1]
    places = np.arange(1, size.shape[1] + 1)
    for k in (50, 100):
      axis.loglog(
        places, np.percentile(size, k, axis=0), label=f"percentile {k}"
      )
    axis.set(title=name, xlabel="channel, by size in its token")
  axes[0].set(ylabel="|x| over tokens")
  axes[0].legend(frameon=False)
  found = input_errors.errors(x, w, key)
  rows = [{k: float(found[k])} for k in input_errors.COLUMNS]
  return figure, [{"what": k, "found": v} for r in rows for k, v in r.items()]


def keys_and_values(
  loaded: Loaded, tokens: Int[Array, "1 T"], layer: int
) -> dict[str, np.ndarray]:
  """Returns the first head's keys, after the rotation, and values `[T, H]`."""
  x = calibrate.embed(loaded.model, loaded.params, tokens)
  kinds = loaded.model.layer_kinds()
  for block, params in zip(kinds, tree.layers(loaded.params), strict=True):
    if layer == 0:
      break
    x, layer = calibrate.outputs(block, params, x), layer - 1
  a, positions = block.attention, jnp.arange(x.shape[1])[None]
  normed = block.norm.apply({"params": params["attention_norm"]}, x)
  rotation = a.rope.tables(positions, a.head_dim)
  own = {"params": params["attention"]}
  _, k, v = a.apply(own, normed, rotation, method="heads_of")
  return {"keys": np.asarray(k)[0, :, 0], "values": np.asarray(v)[0, :, 0]}


def heads(found: Mapping[str, np.ndarray]) -> Any:
  """Returns a figure of keys and values, tokens down, channels across."""
  figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
  for axis, (name, x) in zip(axes, found.items(), strict=True):
    drawn = axis.imshow(np.abs(x), aspect="auto", cmap="viridis")
    figure.colorbar(drawn, ax=axis)
    axis.set(title=f"|{name}|", xlabel="channel", ylabel="token")
  return figure


def compared(quick: bool) -> dict[str, Sequence[Format]]:
  """Returns the formats of the comparison at equal bits, by group."""
  if quick:
    return {"integers": (Affine(bits=4), Affine(bits=3))}
  return {
    "integers": (
      Affine(bits=4),
      Affine(bits=3),
      Affine(bits=4, symmetric=True),
    ),
    "floats": (Microscaling(), NVFP4(), NVFP4(search=6)),
    "codebooks": (Codebook(nested=0), Codebook(), Codebook(kind="fp4")),
    "GGUF": (
      *(GGML(kind=kind) for kind in ("Q4_0", "Q4_1", "Q5_0", "Q8_0")),
      IQ4NL(),
    ),
  }


def measured(
  loaded: Loaded,
  tokens: Int[Array, "N T"],
  formats: Mapping[str, Sequence[Format]],
) -> Rows:
  """Returns sizes of a model's layers in formats, and how much they diverge."""
  base = compare.base_outputs(loaded.model, loaded.params, tokens, batch=1)
  rows = []
  for group, some in formats.items():
    for format in some:
      params = Quantize(format=format)(loaded.params)
      row = {"row": format.name, "group": group}
      row |= dataclasses.asdict(report_errors.sizes(params))
      row |= dataclasses.asdict(compare.compare(base, loaded.model, params))
      rows.append(row)
  return rows


def differing(one: Params, other: Params) -> int:
  """Returns how many layers' matrices of two trees are not bit by bit equal."""
  pairs = zip(tree.layers(one), tree.layers(other), strict=True)
  return sum(
    not np.array_equal(*(np.asarray(weights.dense(x)) for x in both))
    for a, b in pairs
    for both in zip(
      *(jax.tree.leaves(x, is_leaf=weights.is_weight) for x in (a, b)),
      strict=True,
    )
  )
