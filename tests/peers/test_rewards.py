"""Reward models: their goldens, and what transformers makes of ours."""

import json

import make_rewards
import numpy as np
import pytest
import support
import torch
import transformers

CLASSES = {
  "tokens": transformers.AutoModelForTokenClassification,
  "sequence": transformers.AutoModelForSequenceClassification,
}
EXACT = 1e-6
WRITE = """
import pathlib, sys
import jax
import jax.numpy as jnp
import numpy as np
from research.interop.hf import rewards

source, to, out = sys.argv[1:]
model, params, found = rewards.load_reward_model(source)
noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
params = jax.tree.map(noise, params)
tokens = np.load(pathlib.Path(source) / "golden.npz")["tokens"]
np.save(out, jax.jit(model.logits)(params, jnp.asarray(tokens)))
pathlib.Path(to).mkdir()
rewards.write_reward_model(to, model, params, found["config"])
"""


@pytest.mark.parametrize("name", make_rewards.MODELS)
def test_goldens_are_what_the_script_makes(name, tmp_path):
  folder = make_rewards.TO / name
  made = make_rewards.make(name, tmp_path)
  with np.load(folder / "golden.npz") as file:
    support.assert_same_arrays(made, dict(file), EXACT)
  for file in ("config.json", "model.safetensors"):
    old, new = folder / file, tmp_path / name / file
    assert old.read_bytes() == new.read_bytes(), file


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_reads_what_we_write(name, heptad, tmp_path):
  to, out = tmp_path / "model", tmp_path / "logits.npy"
  heptad.script(WRITE, make_rewards.TO / name, to, out)
  config = json.loads((to / "config.json").read_text())
  assert config["architectures"] == make_rewards.MODELS[name]["architectures"]
  model, report = CLASSES[name].from_pretrained(
    to, dtype=torch.float32, output_loading_info=True
  )
  assert not report["missing_keys"] and not report["unexpected_keys"]
  tokens, real = make_rewards.text()
  with torch.no_grad():
    got = model.eval()(input_ids=torch.from_numpy(tokens).long()).logits.numpy()
  want = np.load(out)
  if got.ndim == 2:
    want = want[np.arange(2), real.sum(1) - 1]
  else:
    got, want = got[real], want[real]
  assert support.relative_error(got, want) < 1e-5
