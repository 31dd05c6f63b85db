"""The composition matrix: adapters, quantizers, kinds of models, objectives.

The cases cover every pair of values that compose. The truth of a case is the
same loss of plain arrays: what is packed decoded, what is adapted merged.
"""

import dataclasses
import functools
import itertools
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research import tables, training, tree, weights
from research.lora import wrap
from research.quant.algorithms import qat
from research.training.checkpoints.checkpoint import Checkpoints
from research.typing import UserError
from tests import support_composition as matrix
from tests.support_pairwise import pairwise

PAGE = pathlib.Path(__file__).parents[2] / "research" / "COMPOSITION.md"

AXES = {
  "adapter": tuple(matrix.ADAPTERS),
  "quantizer": tuple(matrix.QUANTIZERS),
  "kind": tuple(matrix.KINDS),
  "objective": matrix.OBJECTIVES,
}

CAUSAL = "dense", "gemma", "experts"

NO_ORDER = (
  "runs, but is meaningless: attention is bidirectional, so each state has"
  " already seen the next token"
)
MEANINGLESS = {  # kind, objective -> why
  ("diffusion", objective): NO_ORDER
  for objective in matrix.OBJECTIVES
  if objective not in matrix.DIFFUSION
}


@dataclasses.dataclass(frozen=True)
class Refusal:
  """A UserError.

  Attributes:
    match: regular expression of its message.
    why: what the page says.
  """

  match: str
  why: str


NO_MASK = Refusal(
  "mask_id: found -1",
  "refused: there is no mask token; `experiments.convert --mask_token=new`"
  " makes a diffusion model",
)
NO_TOKENS = Refusal(
  "ALoRA: does not know the batch's tokens",
  "refused: ALoRA is active after its invocation tokens, which may be masked",
)
REFUSED = {  # two values -> the error
  **{(k, o): NO_MASK for k in CAUSAL for o in matrix.DIFFUSION},
  **{
    ("reward", objective): Refusal(
      rf"{objective}.model: found RewardModel",
      "refused: a reward head has no logits over the vocabulary",
    )
    for objective in matrix.OBJECTIVES
    if objective != "StepReward"
  },
  **{
    ("vision", objective): Refusal(
      f"WithImages.objective: found {objective}",
      "refused: images belong to rows of a batch, and a pair is two rows",
    )
    for objective in matrix.PAIRS
  },
  ("ALoRA", "QAT int4"): Refusal(
    "ALoRA: cannot be merged",
    "refused: QAT merges the adapter before rounding; ALoRA cannot be merged",
  ),
  ("ALoRA", "experts"): Refusal(
    "ALoRA: found rows .* heads and experts cannot be adapted",
    "refused: tokens routed to an expert have lost their order in the text",
  ),
  **{("ALoRA", x): NO_TOKENS for x in ("diffusion", *matrix.DIFFUSION)},
}


def compatible(case):
  """Returns whether a case composes."""
  values = set(case.values())
  return not any(values.issuperset(x) for x in (*MEANINGLESS, *REFUSED))


CASES = pairwise(AXES, compatible)

KEY = jax.random.key(4)


MUST = "kind", "objective"
"""Axes of which `make test` runs all values."""


def _few(cases):
  """Returns the indices of some cases with all kinds and objectives.

  Greedily those of new values, of adapters and quantizers as well.
  """
  met, out = set(), []
  left = {item for case in cases for item in case.items() if item[0] in MUST}
  while left - met:
    news = [set(case.items()) - met for case in cases]
    best = max(
      range(len(cases)), key=lambda i: bool(news[i] & left) * len(news[i])
    )
    met |= news[best]
    out.append(best)
  return out


FEW = _few(CASES)


@functools.cache
def _loss_of_arrays(objective, kind, width):
  """Returns the compiled mean loss of a model of plain arrays."""
  goal = matrix.loss(objective, kind, width, pairs=objective in matrix.PAIRS)

  def mean(params, batch):
    total, weight, _ = goal(params, batch, jax.random.fold_in(KEY, 0))
    return total / weight

  return jax.jit(mean)


@jax.jit
def _arrays(params):
  """Returns what weights stand for; what cannot be merged is over an array."""

  def one(w):
    if weights.is_adapter(w) and w.method.GATED:
      return w.map_base(weights.dense)
    return weights.dense(w)

  params = qat.Convert()(params)
  gated = any(
    weights.is_adapter(w) and w.method.GATED
    for _, w in weights.named_weights(params)
  )
  params = params if gated else wrap.merge(params)
  return jax.tree.map(one, params, is_leaf=weights.is_weight)


def _changed(before, after):
  """Returns path -> whether the array changed, that of every layer."""
  was, out = dict(tree.flatten_paths(before)), {}
  for path, x in tree.flatten_paths(after):
    moved = np.asarray(x) != np.asarray(was[path])
    if re.search(r"(^|/)run\d+/", path):
      moved = moved.reshape(len(moved), -1).any(1)
      assert moved.all() == moved.any(), f"{path}: only some layers moved"
    out[path] = bool(moved.any())
  return out


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(
      case,
      id="-".join(case.values()).replace(" ", "_"),
      # These programs take as long as all others.
      marks=[]
      if i in FEW and case["kind"] in ("dense", "reward")
      else pytest.mark.slow,
    )
    for i, case in enumerate(CASES)
  ],
)
def test_a_composition_trains(case, tmp_path):
  cell = matrix.cell(case)
  batch = matrix.batch(case["kind"], case["objective"])
  step = jax.jit(cell.step)

  def again(state):
    """Returns `step` of the same masks as the first."""
    zero = jnp.zeros_like(state.step)
    state = dataclasses.replace(state, step=zero)
    state, metrics = step(state, batch, KEY)
    return state, float(metrics["loss"])

  first, before = again(cell.state)
  second, _ = again(first)
  _, after = again(second)
  assert np.isfinite([before, after]).all()
  # Rounding in training hides small steps: then the loss need not fall.
  falls = case["quantizer"] != "QAT int4"
  assert after < before if falls else after != before

  start, end = cell.state.trainable, second.trainable
  wait = matrix.WAIT.get(case["adapter"], set())
  for path, moved in _changed(start, first.trainable).items():
    assert moved == (path.rpartition("/")[2] not in wait), path
  assert all(_changed(start, end).values())
  chex.assert_trees_all_equal(second.frozen, cell.state.frozen)
  for path, x in tree.flatten_paths(second.frozen):
    assert "/trained/" not in path
    np.testing.assert_array_equal(
      x, dict(tree.flatten_paths(cell.params))[path]
    )

  plain = _arrays(second.params)
  if cell.base is not None:
    plain = {"policy": plain, "reference": _arrays(cell.base)}
  loss = _loss_of_arrays(case["objective"], case["kind"], matrix.width(case))
  # fp32: sums of up to 512 products in another order, through two layers.
  assert after == pytest.approx(float(loss(plain, batch)), rel=2e-4, abs=1e-4)

  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(second)
    found = checkpoints.restore(cell.state)
  chex.assert_trees_all_equal(found, second)
  assert again(found)[1] == after


@pytest.mark.parametrize("pair", REFUSED, ids="-".join)
def test_what_cannot_compose_says_so(pair):
  case = next(
    case
    for case in matrix.product(AXES)
    if {*case.values()}.issuperset(pair)
    and not any(
      {*case.values()}.issuperset(other)
      for other, refusal in REFUSED.items()
      if refusal != REFUSED[pair]
    )
    and (case["kind"], case["objective"]) not in MEANINGLESS
  )
  with pytest.raises(UserError, match=REFUSED[pair].match):
    cell = matrix.cell(case)
    batch = matrix.batch(case["kind"], case["objective"])
    jax.eval_shape(cell.step, cell.state, batch, KEY)


@pytest.mark.parametrize("format", ["none", "NF4", "QAT int4"])
def test_packed_weights_are_not_trained(format):
  case = dict.fromkeys(AXES, "none") | {
    "quantizer": format,
    "kind": "dense",
    "objective": "NextToken",
  }
  params = matrix.cell(case).params
  how = matrix.QUANTIZERS[format]
  if how is None or isinstance(how, qat.Prepare):
    training.create(params, ".", optax.sgd(1.0))
  else:
    with pytest.raises(UserError, match="packed weights stay frozen"):
      training.create(params, ".", optax.sgd(1.0))


def _numbered(rows, columns, says):
  """Returns a table of yes and numbers of notes, and the notes."""
  notes, out = [], []
  for row in rows:
    cells = []
    for column in columns:
      why = says(row, column)
      if why is not None and why not in notes:
        notes.append(why)
      cells.append("yes" if why is None else f"({notes.index(why) + 1})")
    out.append([row, *cells])
  table = tables.markdown(["", *columns], out)
  return table, [f"{i}. {why}." for i, why in enumerate(notes, 1)]


def _says(row, column):
  if (row, column) in MEANINGLESS:
    return MEANINGLESS[row, column]
  refusal = REFUSED.get((row, column))
  return refusal and refusal.why


def test_the_page_has_the_matrix():
  """Print `_numbered(...)` to write its tables anew."""
  text = PAGE.read_text("utf-8")
  for rows, columns in (
    (AXES["kind"], AXES["objective"]),
    (AXES["adapter"], AXES["quantizer"]),
    (("ALoRA", "every other"), (*AXES["kind"], *AXES["objective"])),
  ):
    table, notes = _numbered(rows, columns, _says)
    assert table in text
    assert "\n".join(notes) in text
  for kind, what in matrix.KINDS.items():
    assert f"* {kind}: {what}" in text
  assert f"{len(CASES)} cases" in text


IN_SHORT = {
  "Llama, Gemma 2, mixture of experts": CAUSAL,
  "images and text (SigLIP, Llama)": ("vision",),
  "masked diffusion (LLaDA)": ("diffusion",),
  "reward head (Qwen2.5-Math-PRM)": ("reward",),
}
"""What the README calls kinds of models."""

TOGETHER = (
  ("NextToken", "Distill", "PolicyGradient"),
  ("DPO",),
  ("StepReward",),
  ("MaskedDiffusion", "GRPO"),
  ("VRPO",),
)
"""Objectives that share a column of the README."""


def test_the_readme_has_the_matrix_in_short():
  assert sorted(sum(IN_SHORT.values(), ())) == sorted(AXES["kind"])
  assert sorted(sum(TOGETHER, ())) == sorted(AXES["objective"])
  counts = (len(AXES[axis]) - 1 for axis in ("adapter", "quantizer"))
  packed = " x ".join(map(str, counts))  # "none" is not counted
  rows = []
  for label, kinds in IN_SHORT.items():
    cells = []
    for objectives in TOGETHER:
      pairs = itertools.product(kinds, objectives)
      [composes] = {_says(*pair) is None for pair in pairs}
      cells.append("yes" if composes else "no")
    rows.append([label, packed, *cells])
  head = ["", "adapters x quantizers", *map(", ".join, TOGETHER)]
  text = (PAGE.parents[1] / "README.md").read_text("utf-8")
  assert tables.markdown(head, rows) in text
  assert f"{len(CASES)} cases" in text


def test_every_pair_that_composes_is_in_a_case():
  """By enumeration, and every value composes with some of every other axis."""

  def pairs(cases):
    return {
      pair for case in cases for pair in itertools.combinations(case.items(), 2)
    }

  every = [x for x in matrix.product(AXES) if compatible(x)]
  assert pairs(CASES) == pairs(every)
  assert len(CASES) < 160 and 6 <= len(FEW) <= 10
  assert {v for case in CASES for v in case.values()} == {
    value for values in AXES.values() for value in values
  }
