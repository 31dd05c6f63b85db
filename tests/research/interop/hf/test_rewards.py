"""Reward models of transformers' layouts, read, scored and written again."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.interop.hf import rewards
from research.io import safetensors
from research.lora.adapt import Adapt
from research.prm.heads import LinearHead, MlpHead
from research.prm.model import RewardModel
from research.typing import UserError

GOLDEN = pathlib.Path(__file__).parents[3] / "golden" / "rewards"
HEADS = {
  "tokens": LinearHead(outputs=2, dropout=0.1),
  "sequence": LinearHead(outputs=1, bias=False),
  "prm": MlpHead(outputs=2),
  "value": LinearHead(outputs=1, dropout=0.1),
}


def tensors(folder):
  return {
    name: np.array(x.read())
    for name, x in safetensors.open_directory(folder).items()
  }


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_the_peer_s_and_files_come_back(name, tmp_path):
  model, params, source = rewards.load_reward_model(GOLDEN / name)
  assert model.head == HEADS[name]
  with np.load(GOLDEN / name / "golden.npz") as golden:
    tokens, real, want = (golden[k] for k in ("tokens", "real", "logits"))
  run = jax.jit(lambda params: model.logits(params, jnp.asarray(tokens)))
  got = np.asarray(run(params))
  if want.ndim == 2:  # a sequence classifier's, at each row's last token
    got = got[np.arange(2), real.sum(1) - 1]
  else:
    got = got * real[..., None]
  np.testing.assert_allclose(got, want, atol=1e-5 * np.ptp(want))
  # Both ways: the same names, bytes and description.
  layout = source["layout"]
  rewards.write_reward_model(
    tmp_path, model, params, source["config"], layout, "float32"
  )
  old, new = tensors(GOLDEN / name), tensors(tmp_path)
  assert old.keys() == new.keys()
  for key, value in old.items():
    np.testing.assert_array_equal(new[key], value, err_msg=key)
  before, after = (
    json.loads((folder / "config.json").read_text())
    for folder in (GOLDEN / name, tmp_path)
  )
  assert after == before


@pytest.mark.slow
def test_a_new_model_is_described_by_itself(tmp_path):
  """Without a config.json of its source; adapters of the head are merged."""
  model, params, _ = rewards.load_reward_model(GOLDEN / "tokens")
  adapted = Adapt(targets=("score/out", "q"))(params, jax.random.key(0))
  rewards.write_reward_model(tmp_path, model, adapted)
  again, found, source = rewards.load_reward_model(tmp_path)
  assert again == model
  assert source["config"]["architectures"] == ["Qwen2ForTokenClassification"]
  assert len(source["config"]["id2label"]) == 2
  # New adapters change nothing.
  jax.tree.map(np.testing.assert_array_equal, found, params)
  other = RewardModel(backbone=model.backbone, head=MlpHead())
  with pytest.raises(
    UserError, match="layout value: has no names for score/up"
  ):
    rewards.write_reward_model(
      tmp_path / "x", other, other.init(jax.random.key(0)), layout="value"
    )


def damaged(tmp_path, change):
  """Returns a copy of a golden folder with changed tensors."""
  folder = tmp_path / "model"
  shutil.copytree(GOLDEN / "tokens", folder)
  found = change(tensors(folder))
  (folder / "model.safetensors").unlink()
  safetensors.write_directory(folder, found)
  return folder


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda x: {k: v for k, v in x.items() if not k.startswith("score")},
      "found no tensor of a head, expected those of a reward model",
    ),
    (
      lambda x: x | {"score.weight": np.zeros((2, 7), np.float32)},
      r"score.weight has shape \[2, 7\], expected \[2, 24\]",
    ),
    (
      lambda x: x | {"v_head.summary.weight": x["score.weight"]},
      "found score.bias, score.weight, v_head.summary.weight, expected",
    ),
  ],
)
def test_other_heads_are_refused(change, message, tmp_path):
  with pytest.raises(UserError, match=message):
    rewards.load_reward_model(damaged(tmp_path, change))
