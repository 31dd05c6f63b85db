"""Diffusion models' goldens are what transformers computes."""

import make_diffusion
import numpy as np
import pytest
import support

# fp64 rounded to fp32: half an ulp, and the last bits of another BLAS.
EXACT = 1e-6


@pytest.mark.parametrize("name", make_diffusion.CASES)
def test_made_anew(name, tmp_path):
  made = make_diffusion.make(name, tmp_path)
  with np.load(make_diffusion.TO / name / "golden.npz") as file:
    support.assert_same_arrays(made, dict(file), EXACT)
  for file in ("config.json", "model.safetensors"):
    old, new = make_diffusion.TO / name / file, tmp_path / name / file
    assert old.read_bytes() == new.read_bytes()


def test_all_see_each_other():
  """The mask matters: a causal model says something else."""
  peer, _ = make_diffusion.CASES["llada"]
  tensors = make_diffusion.draw(peer, 0)
  golden = make_diffusion.asked(peer, tensors, shift=False)
  model = make_diffusion.build(peer, tensors)
  import torch

  with torch.no_grad():
    causal = model(torch.from_numpy(golden["tokens"][:1]).long()).logits
  first = np.abs(causal[0, 0].numpy() - golden["logits"][0, 0]).max()
  last = np.abs(causal[0, -1].numpy() - golden["logits"][0, -1]).max()
  assert first > 0.1 and last > 0.01


@pytest.mark.parametrize("name", make_diffusion.CASES)
def test_logits(name, heptad):
  """Heptad's, of the file, and transformers', of its own tensors, now."""
  with np.load(make_diffusion.TO / name / "golden.npz") as file:
    golden = dict(file)
  got = heptad.bridge("scores", make_diffusion.TO / name, **golden)["logits"]
  peer, config = make_diffusion.CASES[name]
  shift = name == "dream"
  seed = list(make_diffusion.CASES).index(name)
  want = make_diffusion.asked(
    peer, make_diffusion.draw(peer, seed), shift, config.get("block_length")
  )
  real = golden["positions"] >= shift
  assert support.relative_error(got[real], want["logits"][real]) < 1e-5
