"""Adapters on diffusion models are what PEFT makes of modules so called."""

import make_peft_diffusion
import numpy as np
import peft
import pytest
import safetensors.numpy
import support
import torch

# A product of rank 2 and a sum, in fp32, by another BLAS.
EXACT = 1e-6


@pytest.mark.parametrize("name", make_peft_diffusion.CASES)
def test_made_anew(name, tmp_path):
  made = make_peft_diffusion.make(name, tmp_path)
  stored = make_peft_diffusion.TO / name
  with np.load(stored / "merged.npz") as file:
    support.assert_same_arrays(made, dict(file), EXACT)
  file = "adapter_model.safetensors"
  assert (stored / file).read_bytes() == (tmp_path / name / file).read_bytes()


@pytest.mark.parametrize("name", make_peft_diffusion.CASES)
def test_peft_finds_all_that_we_write(name, tmp_path, heptad):
  """Read and written again by Heptad, merged by PEFT."""
  stored = make_peft_diffusion.TO / name
  base, _ = make_peft_diffusion.CASES[name]
  where = make_peft_diffusion.BASES / base
  heptad.command(
    *("convert", f"--from={stored}", f"--to={tmp_path / 'a'}"),
    *("--format=peft", f"--base={where}"),
  )
  tensors = safetensors.numpy.load_file(where / "model.safetensors")
  model = make_peft_diffusion.skeleton(tensors)
  # What PEFT asks of a causal model's class, which all of these have.
  model.prepare_inputs_for_generation = lambda *_, **__: {}
  wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "a")
  with torch.no_grad():
    state = wrapped.merge_and_unload().state_dict()
  with np.load(stored / "merged.npz") as file:
    for key, want in file.items():
      got = state[key].numpy()
      np.testing.assert_allclose(got, want, atol=EXACT * np.abs(want).max())
