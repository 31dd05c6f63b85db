"""The axes of the composition matrix, and a tiny cell of any of their values.

A cell is a case `{"adapter", "quantizer", "kind", "objective"}` of names. The
page `research/COMPOSITION.md` has the tables that follow from these.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research import training, tree, weights
from research.diffusion.alignment.estimators import Elbo
from research.diffusion.alignment.grpo import GRPO
from research.diffusion.alignment.preference import VRPO
from research.diffusion.objective import MaskedDiffusion
from research.lora import Adapt, wrap
from research.lora.methods.adalora import AdaLoRA
from research.lora.methods.alora import ALoRA
from research.lora.methods.dora import DoRA
from research.lora.methods.hira import HiRA
from research.lora.methods.ia3 import IA3
from research.lora.methods.lora import LoRA
from research.lora.methods.rotations import OFT
from research.lora.methods.shira import SHiRA
from research.lora.methods.svd_init import PiSSA
from research.lora.methods.tokens import Tokens
from research.lora.methods.vera import VeRA
from research.nn.moe.routing import Routing
from research.nn.presets import Sparse
from research.nn.transformer import Transformer
from research.prm.heads import MlpHead
from research.prm.model import GenerativeReward, RewardModel
from research.prm.objective import StepReward
from research.quant import Codebook, GPTQMethod, Quantize, methods
from research.quant.algorithms import qat
from research.quant.algorithms.gptq import GPTQ
from research.quant.algorithms.outlier_rows import KeepOutlierRows
from research.quant.formats.affine import Affine
from research.quant.formats.ggml import GGML
from research.quant.formats.int8 import Int8
from research.quant.formats.kquants import Q4K
from research.quant.formats.microscaling import Microscaling
from research.quant.formats.nvfp4 import NVFP4
from research.training.alignment.policy_gradient import PolicyGradient
from research.training.alignment.surrogate import Clip, Surrogate
from research.training.objectives.distill import Distill
from research.training.objectives.objective import with_model
from research.training.objectives.preference import (
  DPO,
  Copies,
  Part,
  all_params,
)
from research.vlm import VisionLanguageModel, WithImages, Within, connectors
from research.vlm.encoders import EncoderSizes, siglip
from tests import support

Case = dict[str, str]

VOCAB, LENGTH, ROWS, ANSWER = 48, 12, 4, 4
MASK, IMAGE = VOCAB - 1, VOCAB
CALL = 5
SOFT = 4
"""Soft tokens of an image."""

ADAPTERS = {
  "none": None,
  "LoRA": LoRA(rank=2),
  "DoRA": DoRA(rank=2),
  "PiSSA": PiSSA(rank=2),
  "AdaLoRA": AdaLoRA(rank=2, alpha=64.0),
  "VeRA": VeRA(rank=4),
  "HiRA": HiRA(rank=2),
  "IA3": IA3(),
  "OFT": OFT(block=4),
  "SHiRA": SHiRA(rank=2),
  "Tokens": Tokens(ids=(CALL, 7)),
  "ALoRA": ALoRA(rank=2, invocation=(CALL,)),
}

WAIT = {
  "LoRA": {"a"},
  "ALoRA": {"a"},
  "DoRA": {"a"},
  "AdaLoRA": {"a", "b"},
  "VeRA": {"d"},
  "HiRA": {"a"},
}
"""Arrays whose gradient is 0 at the first step: what they multiply is still 0.

At the second step they move."""


def _nearest(format):
  return Quantize(format=format)


QUANTIZERS = {
  "none": None,
  "NF4": _nearest(Codebook(block=32)),
  "int8": _nearest(Int8()),
  "Q8_0": _nearest(GGML(kind="Q8_0")),
  "Q4_K": _nearest(Q4K()),
  "GPTQ int4": GPTQMethod(options=GPTQ(order="activations")),
  "int4 + outliers": KeepOutlierRows(rows=2),
  "MXFP4": _nearest(Microscaling()),
  "NVFP4": _nearest(NVFP4()),
  "QAT int4": qat.Prepare(format=Affine(block=16, symmetric=True)),
}

KINDS = {
  "dense": "Llama",
  "gemma": "Gemma 2: sliding windows, soft caps, tied embeddings",
  "experts": "a mixture of experts; experts are also quantized and adapted",
  "vision": "a SigLIP encoder, a connector, a language model",
  "diffusion": "LLaDA, with bidirectional attention",
  "reward": "Qwen2, with biases, and the reward head of Qwen2.5-Math-PRM",
}

OBJECTIVES = (
  "NextToken",
  "Distill",
  "DPO",
  "PolicyGradient",
  "StepReward",
  "MaskedDiffusion",
  "VRPO",
  "GRPO",
)
DIFFUSION = "MaskedDiffusion", "VRPO", "GRPO"
PAIRS = "DPO", "VRPO"
"""Those with a reference, whose rows are pairs of answers."""


def product(axes: dict[str, tuple[str, ...]]) -> list[Case]:
  """Returns all cases."""
  return [
    dict(zip(axes, values, strict=True))
    for values in itertools.product(*axes.values())
  ]


def width(case: Case) -> int:
  """Returns the model's width: a block of Q4_K is 256 weights."""
  return 256 if case["quantizer"] == "Q4_K" else 32


def network_of(kind: str, objective: str) -> str:
  """Returns the network's kind: images need a head of their own for scores."""
  judges = kind == "vision" and objective == "StepReward"
  return "vision with a head" if judges else kind


@functools.cache
def model(kind: str, width: int) -> Any:
  """Returns a network of two layers; see `network_of`."""
  sizes = dict(
    vocab=VOCAB,
    width=width,
    depth=2,
    heads=2,
    kv_heads=1,
    hidden=2 * width,
    head_dim=width // 2,
    window=4,
  )
  if kind == "gemma":
    return support.model("gemma2", **sizes)
  if kind == "experts":
    sparse = Sparse(routing=Routing(experts=4, active=2), hidden=width)
    return support.model("qwen3_moe", **sizes, sparse=sparse)
  if kind == "diffusion":
    return support.model("llama", **sizes | {"kv_heads": 2})
  if kind == "reward":
    backbone = support.model("qwen2", **sizes, tied=True)
    return RewardModel(backbone=backbone, head=MlpHead())
  language = support.model("llama", **sizes)
  if kind == "dense":
    return language
  if kind == "vision with a head":
    language = RewardModel(backbone=language)
  encoder = EncoderSizes(
    width=width, depth=2, heads=2, hidden=2 * width, patch=4, grid=4
  )
  return VisionLanguageModel(
    vision=siglip(encoder),
    connector=connectors.Squares(
      side=2, inner=connectors.Linear(size=width, bias=False)
    ),
    language=language,
    image_token=IMAGE,
  )


@functools.cache
def params(kind: str, width: int, seed: int = 0) -> Any:
  """Returns random weights, by which every output depends on every input."""
  network, rng = model(kind, width), np.random.default_rng(seed)
  if isinstance(network, Transformer):
    shapes = support.shapes(network)
  else:
    shapes = jax.eval_shape(network.init, jax.random.key(0))

  def draw(path, x):
    value = 1.7 * width**-0.5 * rng.standard_normal(x.shape)
    if path.endswith("scale"):
      value = (kind != "gemma") + 0.1 * value
    return jnp.asarray(value, jnp.float32)

  return tree.map_paths(draw, shapes)


def batch(kind: str, objective: str) -> dict[str, Any]:
  """Returns rows of two documents, of one, and with padding, or of images."""
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, MASK, (ROWS, LENGTH))
  tokens[:, [5, 7]] = CALL
  place = np.broadcast_to(np.arange(LENGTH), tokens.shape).copy()
  segments = np.zeros_like(tokens)
  if kind == "vision":
    tokens[:, :SOFT] = IMAGE
  else:
    segments[0, 6:], place[0, 6:] = 1, np.arange(LENGTH - 6)
  segments[-1, -2:] = place[-1, -2:] = -1
  after = np.pad(segments[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
  at = np.arange(LENGTH)
  learned = (segments >= 0) & (after == segments) & (at >= ANSWER)
  targets = np.where(learned, np.roll(tokens, -1, 1), 0)
  rows = {
    "tokens": jnp.asarray(tokens, jnp.int32),
    "targets": jnp.asarray(targets, jnp.int32),
    "positions": jnp.asarray(place, jnp.int32),
    "segments": jnp.asarray(segments, jnp.int32),
    "weights": jnp.asarray(learned, jnp.float32),
  }
  advantage = jnp.asarray([1.0, -1.0, 0.5, -0.5])
  if objective in PAIRS:
    rows = {k: x.reshape(ROWS // 2, 2, LENGTH) for k, x in rows.items()}
  elif objective in ("PolicyGradient", "GRPO"):
    old = jnp.full((ROWS, LENGTH), -np.log(VOCAB), jnp.float32)
    rows |= {"advantage": advantage, "old": old}
  elif objective == "StepReward":
    ends = learned & (at % 3 == 2)
    labels = (at % 2 == 0) & ends
    rows |= {
      "labels": jnp.asarray(labels, jnp.float32),
      "weights": jnp.asarray(ends, jnp.float32),
    }
  if objective == "GRPO":
    rows |= {
      "valid": jnp.asarray(segments >= 0),
      "answer": jnp.asarray((segments >= 0) & (at > ANSWER)),
      "seed": jnp.arange(ROWS, dtype=jnp.int32),
    }
  if kind == "vision":
    pixels = rng.integers(0, 256, (len(rows["tokens"]), 1, 16, 16, 3), np.uint8)
    rows |= {"pixels": jnp.asarray(pixels)}
  return rows


@dataclasses.dataclass(frozen=True)
class _Teacher:
  """Selects another model's parameters, which see the student's images."""

  params: Any

  def __call__(self, params: Any) -> Any:
    embed = params["embed"]
    if isinstance(embed, weights.WrappedWeight) and embed.per_row:
      embed = dataclasses.replace(embed, w=self.params["embed"])
      return {**self.params, "embed": embed}
    return self.params


# Ratios of a policy that has not sampled: no gradient may be clipped.
_SURROGATE = Surrogate(clip=Clip(lower=0.999, upper=1e6))


def loss(name: str, kind: str, width: int, pairs: bool = False) -> Any:
  """Returns the objective of a kind of model.

  Args:
    name: the objective's.
    kind: the model's.
    width: the model's.
    pairs: whether policy and reference are two parts of one tree; otherwise
      the reference is the policy without its adapters.
  """
  network, mask = model(network_of(kind, name), width), -1
  if kind in ("diffusion", "vision"):
    mask = MASK
  if name == "StepReward" and isinstance(network, Transformer):
    network = GenerativeReward(backbone=network, right=1, wrong=2)
  parts = {"reference": wrap.disable}
  if pairs:
    parts = {"policy": Part("policy"), "reference": Part("reference")}
  teacher = params(kind, width, 7)
  teacher = _Teacher(teacher.get("language", teacher))
  objective = {
    "NextToken": training.NextToken(),
    "Distill": Distill(student=all_params, source=teacher),
    "DPO": DPO(**parts),
    "PolicyGradient": PolicyGradient(surrogate=_SURROGATE),
    "StepReward": StepReward(),
    "MaskedDiffusion": MaskedDiffusion(mask_id=mask),
    "VRPO": VRPO(mask_id=mask, estimator=Elbo(times=2), **parts),
    "GRPO": GRPO(mask_id=mask, surrogate=_SURROGATE),
  }[name]
  if kind == "vision":
    objective = WithImages(objective=objective)
  return with_model(objective, network)


def quantized(case: Case, params: Any) -> Any:
  """Returns packed weights; those of QAT are rounded once they are adapted."""
  how = QUANTIZERS[case["quantizer"]]
  if how is None or isinstance(how, qat.Prepare):
    return params
  if not isinstance(how, Quantize):
    how = functools.partial(_rounded, how)
  return _transformed(case, how, ("vision", "language"), params)


def _rounded(method, params, key=None):
  """Returns weights packed by a method that measures inputs: random ones."""
  del key
  rng = np.random.default_rng(2)
  paths = set(Quantize().selected_paths(params))

  def one(path, w):
    if path not in paths:
      return w
    *lead, inputs, outputs = w.shape
    matrices = w.reshape(-1, inputs, outputs)
    x = rng.standard_normal((len(matrices), 4 * inputs, inputs))
    x = np.asarray(x * np.exp(rng.standard_normal(inputs)), np.float32)
    stats = {
      "xx": jnp.asarray(x.swapaxes(1, 2) @ x),
      "n": jnp.full((len(x), 1), 4.0 * inputs),
    }
    format = Affine(bits=4, block=16)
    (q,), _, _ = methods.round_matrices((matrices,), stats, format, method)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[1:]), q)

  return tree.map_paths(one, params)


def adapted(case: Case, params: Any) -> Any:
  """Returns weights with new adapters, and what trains with rounding."""
  method, rounds = ADAPTERS[case["adapter"]], QUANTIZERS[case["quantizer"]]
  towers = ("vision", "language")
  if method is not None:
    adapt = Adapt(method=method, targets=_targets(case))
    # Images have no tokens.
    own = towers[1:] if isinstance(method, ALoRA | Tokens) else towers
    params = _transformed(case, adapt, own, params)
  if isinstance(rounds, qat.Prepare):
    params = _transformed(case, rounds, towers, params)
  return params


def _transformed(case, transform, towers, params):
  """Returns the parameters, of towers if they have some, transformed."""
  key = jax.random.key(3)
  if case["kind"] != "vision":
    return transform(params, key)
  for tower in towers:
    params = Within(tower, transform)(params, key)
  return params


def _targets(case):
  if case["adapter"] == "Tokens":
    return ("embed",)
  if case["kind"] == "experts":
    return r"layers/\d+/(attention/[qkvo]|mlp/experts/\w+)"
  return "all-linear"


def trainable(case: Case) -> str:
  """Returns the pattern of what a case trains.

  Without adapters that is everything that is not packed.
  """
  if case["adapter"] != "none":
    return wrap.TRAINABLE
  top = "^policy/" if case["objective"] in PAIRS else "^"
  return rf"{top}(?!.*/(parts|order|outliers|start)(/|$))"


@dataclasses.dataclass(frozen=True)
class Cell:
  """A case: a model, its loss, and the base of its adapters.

  Attributes:
    params: packed, adapted.
    base: the same without adapters, where they are a policy's; or None.
    objective: the loss.
    state: the first training state.
    step: one training step.
  """

  params: Any
  base: Any
  objective: Any
  state: training.TrainState
  step: Any


def cell(case: Case) -> Cell:
  """Builds a case; compiles no step."""
  kind, size = case["kind"], width(case)
  network = network_of(kind, case["objective"])
  bare = quantized(case, params(network, size))
  full, base = adapted(case, bare), None
  pairs = case["objective"] in PAIRS
  alone = case["adapter"] == "none"
  if pairs and not alone:
    base = adapted(case | {"adapter": "none"}, bare)
  objective = loss(case["objective"], kind, size, pairs and alone)
  if pairs and alone:
    full = Copies()(full, jax.random.key(0))
  tx = optax.adam(3e-4 if alone else 3e-3)
  state = training.create(full, trainable(case), tx)
  step = training.make_train_step(objective, tx)
  return Cell(full, base, objective, state, step)
