"""Tiny models with random weights, shared by the tests.

Weights come from numpy: compiling jax's initialisers costs more than most
tests. Scales are large enough for logits to depend on every weight.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from research import tree, weights
from research.nn import gemma4 as gemma4_models
from research.nn import presets

SIZES = presets.Sizes(
  vocab=67,
  width=32,
  depth=3,
  heads=4,
  kv_heads=2,
  hidden=44,
  head_dim=8,
  window=6,
)

GEMMA_SIZES = dataclasses.replace(
  SIZES, attention_softcap=5.0, logit_softcap=8.0, local_theta=500.0
)


@functools.cache
def model(family: str = "llama", **changes):
  """Returns a tiny model of `family`; `changes` are `Sizes` fields."""
  sizes = GEMMA_SIZES if family.startswith("gemma") else SIZES
  sizes = dataclasses.replace(sizes, **changes)
  return presets.transformer(presets.FAMILIES[family], sizes)


def gemma4(**changes):
  """Returns a tiny Gemma 4; `changes` are `Gemma4Sizes` fields."""
  sizes = dict(
    vocab=67, width=32, hidden=48, heads=4, kinds=("local", "global"), window=6
  )
  for start in ("", "global_"):
    sizes |= {f"{start}kv_heads": 2, f"{start}head_dim": 8}
  found = gemma4_models.Gemma4Sizes(kv_shared_hidden=48, **sizes | changes)
  return gemma4_models.gemma4(found)


def with_scaling(model, scaling):
  """Returns the model with a `rope.Scaling` of the positions of all layers."""
  blocks = []
  for block in model.stack.blocks:
    turned = dataclasses.replace(block.attention.rope, scaling=scaling)
    blocks.append(block.clone(attention=block.attention.clone(rope=turned)))
  return model.clone(
    stack=dataclasses.replace(model.stack, blocks=tuple(blocks))
  )


def linear_head(eq: str, softcap: float | None = None):
  """Returns `logits(head, hidden)` for a head that is a single Weight.

  Args:
    eq: `"btd,dv->btv"` for a head [D, V], `"btd,vd->btv"` for a tied
      embedding [V, D].
    softcap: bound c of c * tanh(logits / c), or None.
  """

  def logits(head, hidden):
    out = weights.einsum(eq, hidden, head)
    return out if softcap is None else softcap * jnp.tanh(out / softcap)

  return logits


@functools.cache
def shapes(model):
  """Returns the shapes of a model's parameters."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])


def params(model, seed: int = 0):
  """Returns random parameters: norms near 1, the rest N(0, 0.3^2)."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    value = 0.3 * rng.standard_normal(x.shape)
    if path.endswith("scale"):
      value = 1 - _offset(model) + 0.1 * value
    return jnp.asarray(value, jnp.float32)

  return tree.map_paths(draw, shapes(model))


def _offset(model):
  return model.norm.offset


def tokens(batch: int = 2, length: int = 16, vocab: int = 67, seed: int = 1):
  """Returns random token ids, int32 `[batch, length]`."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
