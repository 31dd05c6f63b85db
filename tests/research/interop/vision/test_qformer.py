"""BLIP-2's Q-Former out of Hugging Face's tensors, as transformers computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from research import tree
from research.interop.vision import qformer
from research.io import safetensors as files
from research.typing import UserError
from research.vlm.bootstrapping import CaptionHead, ImageText, objective
from research.vlm.connectors.qformer import without_text
from tests import support_connectors

CONFIG = dict(
  model_type="blip-2",
  num_query_tokens=5,
  image_text_hidden_size=16,
  qformer_config=dict(
    vocab_size=31,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=3,
    intermediate_size=28,
    max_position_embeddings=9,
  ),
)
FEATURES = 20


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
  """Returns the model, its parameters, a file's tensors, and golden arrays."""
  tensors, golden = support_connectors.golden("bootstrapping")
  opened = write(tmp_path_factory.mktemp("first"), tensors)
  model = qformer.image_text_model(CONFIG, "config", caption=CaptionHead())
  params = qformer.image_text_params(model, opened, FEATURES)
  return model, params, tensors, golden


def write(folder, tensors):
  safetensors.numpy.save_file(tensors, folder / "model.safetensors")
  return files.open_directory(folder)


def pairs(golden):
  return golden["features"], golden["tokens"], golden["mask"] > 0


def test_vectors_matches_and_captions(first_stage):
  model, params, _, golden = first_stage
  images, texts, _, match, captions = jax.jit(model.apply)(
    {"params": params}, *pairs(golden)
  )
  close = support_connectors.assert_close
  close(images, golden["image_embeds"])
  close(texts, golden["text_embeds"])
  close(objective.similarity(images, texts), golden["similarity"])
  close(match, golden["match"])
  # What padding says is arbitrary.
  real = np.asarray(golden["mask"] > 0)
  close(np.asarray(captions)[real], np.asarray(golden["captions"])[real])


def test_the_three_losses(first_stage):
  """Of torch's cross-entropy; the negatives are the hardest."""
  model, params, _, golden = first_stage
  features, tokens, valid = pairs(golden)
  batch = dict(
    features=features, tokens=tokens, segments=jnp.where(valid, 0, -1)
  )
  total, rows, sums = jax.jit(ImageText(model))(params, batch, None)
  names = "contrast", "matching", "captions"
  theirs = "contrastive_loss", "matching_loss", "caption_loss"
  expected = [golden[name] for name in theirs]
  found = [sums[name] / rows for name in names]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  np.testing.assert_allclose(total / rows, sum(expected), rtol=1e-5)


def test_written_tensors_are_those_that_were_read(first_stage):
  _, params, tensors, _ = first_stage
  found = qformer.image_text_tensors(params)
  assert found.pop("temp").shape == ()
  # The image tower of the file is left alone.
  own = {k: x for k, x in tensors.items() if not k.startswith("vision_model.")}
  assert set(found) == set(own) < set(tensors)
  for name, x in own.items():
    np.testing.assert_array_equal(found[name], x, err_msg=name)


def test_soft_tokens(tmp_path):
  tensors, golden = support_connectors.golden("qformer")
  model = qformer.qformer_from_config(CONFIG, "config", 40)
  params = qformer.qformer_params(model, write(tmp_path, tensors), FEATURES)
  found = jax.jit(model.apply, static_argnums=2)(
    {"params": params}, golden["features"], (1, 5)
  )
  support_connectors.assert_close(found, golden["soft"])
  again = qformer.qformer_tensors(params)
  assert set(again) == set(tensors)
  for name, x in tensors.items():
    np.testing.assert_array_equal(again[name], x, err_msg=name)


def test_the_second_stage_begins_where_the_first_ended(first_stage):
  """Without texts the queries' states are the first stage's."""
  model, params, _, golden = first_stage
  connector = qformer.qformer_from_config(CONFIG, "config", 40)
  own = without_text(params["qformer"])
  expected = jax.eval_shape(
    lambda x: connector.init(jax.random.key(0), x, (1, 5))["params"],
    golden["features"],
  )
  shapes = [(path, x.shape) for path, x in tree.flatten_paths(own)]
  assert shapes == [
    (path, x.shape)
    for path, x in tree.flatten_paths(expected)
    if not path.startswith("projection")
  ]
  states = connector.apply({"params": own}, golden["features"], method="encode")
  projected = states @ params["image_projection"]
  projected += params["image_projection_bias"]
  projected /= jnp.linalg.norm(projected, axis=-1, keepdims=True)
  support_connectors.assert_close(projected, golden["image_embeds"])


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda t: t.pop("query_tokens"), "missing: query_tokens"),
    (lambda t: t.update(extra=np.zeros(3, np.float32)), "superfluous: extra"),
    (
      lambda t: t.update({"qformer.layernorm.bias": np.zeros(3, np.float32)}),
      r"found shape \[3\]",
    ),
  ],
)
def test_a_file_of_another_model_is_refused(change, message, tmp_path):
  tensors, _ = support_connectors.golden("qformer")
  change(tensors)
  model = qformer.qformer_from_config(CONFIG, "config", 40)
  with pytest.raises(UserError, match=message):
    qformer.qformer_params(model, write(tmp_path, tensors), FEATURES)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(model_type="blip"), "expected 'blip-2'"),
    (dict(qformer_config=dict(hidden_act="relu")), "hidden_act"),
    (dict(qformer_config=dict(num_attention_heads=5)), "a divisor of 768"),
  ],
)
def test_a_configuration_that_is_no_qformer_is_refused(change, message):
  with pytest.raises(UserError, match=message):
    qformer.qformer_from_config(CONFIG | change, "config", 40)


def test_a_scanned_period_is_two_blocks(first_stage):
  _, params, _, _ = first_stage
  runs = {k: sorted(params["qformer"][k]) for k in tree.runs(params["qformer"])}
  assert runs == {"run0": ["layer0", "layer1"]}
  assert "cross_attention" in params["qformer"]["run0"]["layer0"]
  assert "cross_attention" not in params["qformer"]["run0"]["layer1"]
