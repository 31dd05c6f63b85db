"""The notebook's pictures of LoRA: which matrix an address is."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.notebooks import lora_story
from research.typing import UserError


def params(scale):
  """Six layers: a run of two, then a period of two that is there twice."""
  eye = np.eye(3, dtype=np.float32)

  def layer(*numbers):
    q = np.stack([scale * n * eye for n in numbers])
    return {"attention": {"q": jnp.asarray(q)}}

  return {
    "embed": jnp.ones((5, 3)),
    "run0": {"layer0": layer(1, 2)},
    "run1": {"layer0": layer(3, 5), "layer1": layer(4, 6)},
  }


@pytest.mark.parametrize("number", range(6))
def test_a_spectrum_is_of_the_layer_that_is_named(number):
  found = lora_story.spectrum(
    params(0.0), params(1.0), f"layers/{number}/attention/q"
  )
  np.testing.assert_allclose(found, np.full(3, number + 1.0))


def test_layers_that_are_not_there_have_no_spectrum():
  for address in ("layers/6/attention/q", "layers/0/attention/k"):
    with pytest.raises(UserError, match="no such matrix"):
      lora_story.spectrum(params(0.0), params(1.0), address)
