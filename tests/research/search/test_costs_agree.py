"""Search, vision and planning say the same of one model and its tokens."""

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas.masks import Mask
from research.generation.stepwise import Stepwise
from research.lora.adapt import Adapt
from research.nn import flops
from research.prm.heads import LinearHead
from research.search.cached_verifier import CachedVerifier
from research.search.engine import Engine
from research.vlm import arithmetic
from research.vlm.masks import BidirectionalPrompt
from research.vlm.presets import PRESETS
from research.vlm.prompts import ImageReader

TEXT = 9


@pytest.mark.parametrize(
  "name", ["nanovlm-222m", "paligemma-3b-224", "blip-2-opt-2.7b"]
)
def test_reading_a_prompt_with_an_image(name):
  """PaliGemma's sees all of itself."""
  preset = PRESETS[name].reduced(16)
  model = preset.model()
  params = jax.eval_shape(model.init, jax.random.key(0))
  plan = preset.preprocessor.plan(224, 224)
  cost = arithmetic.image_cost(preset, 224, 224, TEXT)
  reader = ImageReader(
    model=model,
    params=params,
    flops=arithmetic.pixels_flops(model, (plan.views, *plan.view, 3)),
  )
  policy = Stepwise(
    model=model.language, params=params["language"], reader=reader
  )
  verifier = CachedVerifier(
    model=model.language,
    params=params["language"],
    head=LinearHead(),
    reader=reader,
  )
  searched = Engine(policy=policy, verifier=verifier).prompt_cost(
    cost.total_tokens
  )
  without_logits = cost.encoder_flops + cost.connector_flops
  without_logits += cost.language_flops
  assert searched.flops_policy == without_logits + cost.head_flops
  assert searched.flops_verifier == without_logits
  trained = arithmetic.training_flops(model, plan, cost.total_tokens, ())
  logits = cost.total_tokens * cost.head_flops
  assert sum(trained.values()) == without_logits + logits

  def forward(params, pixels, tokens):
    soft = model.encode(params, pixels)
    text = {"params": params["language"]}
    hidden = model.language.apply(text, tokens, mask=Mask.full())[0][:, -1:]
    return soft, model.language.apply(text, hidden, method="logits")

  pixels = jax.ShapeDtypeStruct((1, plan.views, *plan.view, 3), jnp.uint8)
  tokens = jax.ShapeDtypeStruct((1, cost.total_tokens), jnp.int32)
  traced = flops.count_flops(forward, params, pixels, tokens)
  # The traced program computes all pairs, a causal prompt needs half of them.
  scores = flops.model_cost(model.language)
  n = cost.total_tokens
  every = scores.forward(0, flops.Dense(n, n), 0)
  needed = scores.forward(0, flops.Causal(0, n), 0)
  hidden = 0 if isinstance(model.mask, BidirectionalPrompt) else every - needed
  assert searched.flops_policy == traced - hidden


def test_adapters_of_a_policy_and_of_its_verifier():
  model = PRESETS["llava-1.5-7b"].reduced(32).model().language
  ids = jax.ShapeDtypeStruct((1, TEXT), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
  params = jax.eval_shape(lambda x: Adapt()(x, jax.random.key(0)), shapes)
  policy = Stepwise(model=model, params=params)
  verifier = CachedVerifier(model=model, params=params, head=LinearHead())
  searched = Engine(policy=policy, verifier=verifier).prompt_cost(TEXT)

  def forward(params, tokens):
    hidden = model.apply({"params": params}, tokens)[0][:, -1:]
    return model.apply({"params": params}, hidden, method="logits")

  masked = flops.model_cost(model).forward(0, flops.Dense(TEXT, TEXT), 0)
  masked -= flops.model_cost(model).forward(0, flops.Causal(0, TEXT), 0)
  traced = flops.count_flops(forward, params, ids)
  assert searched.flops_policy == traced - masked
  head = 2 * model.width * model.vocab_size
  assert searched.flops_verifier == searched.flops_policy - head
