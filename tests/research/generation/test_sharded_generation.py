"""Decoding with a cache on a mesh equals that on one device."""

import chex
import jax
import jax.numpy as jnp
import pytest

from research import sharding
from research.nn.transformer import init_cache
from tests import support, support_mesh


def decoded(model, params, tokens):
  """Returns final hidden states of a prefill of 7 and 3 single tokens."""

  @jax.jit
  def run(params, tokens):
    variables, parts = {"params": params}, []
    cache = init_cache(model, params, batch=tokens.shape[0], capacity=12)
    lengths = jnp.full((tokens.shape[0],), 7).at[-1].set(5)
    found, cache = model.apply(
      variables, tokens[:, :7], cache=cache, lengths=lengths
    )
    parts.append(found[:, :5])
    for i in range(7, 10):
      found, cache = model.apply(variables, tokens[:, i : i + 1], cache=cache)
      parts.append(found)
    # Two tokens at once: a windowed layer then looks at its ring and at them.
    found, cache = model.apply(variables, tokens[:, 10:12], cache=cache)
    hidden = jnp.concatenate([*parts, found], axis=1)
    return model.apply(variables, hidden, method="logits")

  return run(params, tokens)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("family", "layout"),
  [
    ("llama", "mixed"),
    ("gemma2", "mixed"),
    ("llama", "sequence"),
    ("experts", "expert"),
  ],
)
def test_logits_with_a_cache_are_one_devices(family, layout):
  model = (
    support_mesh.model("experts")
    if family == "experts"
    else support.model(family, vocab=64)
  )
  params, tokens = support.params(model), support.tokens(4, 12, 64)
  want = decoded(model, params, tokens)
  plan = support_mesh.LAYOUTS[layout]
  mesh = plan.mesh()
  place = plan.shardings(params, mesh, sharding.head_counts(model))
  with jax.set_mesh(mesh):
    got = decoded(
      model,
      jax.device_put(params, place),
      jax.device_put(tokens, sharding.replicated(mesh)),
    )
  # Sums of up to 64 float32 terms through three layers, logits near 10.
  chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-4)
