"""Heptad against transformers and PEFT, live, on the tiny models."""

import families
import make_gguf
import make_models
import make_peft
import numpy as np
import peft
import pytest
import safetensors.numpy
import support
import torch

MODELS = make_models.MODELS


def peer(name: str):
  family = families.FAMILIES[name]
  return make_models.build(family.config, make_models.weights(family))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_family(name, heptad):
  rows = make_models.text(families.FAMILIES[name].length)
  got = heptad.bridge("logits", MODELS / name, **rows)
  want = make_models.logits(peer(name), rows)
  real = rows["attention_mask"] == 1
  assert support.relative_error(got[real], want[real]) < 1e-5
  np.testing.assert_array_equal(got[real].argmax(-1), want[real].argmax(-1))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_greedy_continuation(name, heptad):
  prompt = make_models.text(24)["tokens"][0, : make_models.PROMPT]
  got = heptad.bridge(
    "greedy", MODELS / name, prompt=prompt, steps=make_models.GREEDY
  )
  want = make_models.greedy(peer(name), prompt)
  np.testing.assert_array_equal(got["tokens"], want)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", make_gguf.FILES)
def test_gguf(name, packed, heptad):
  with np.load(MODELS / name / "golden.npz") as file:
    want, tokens = file["logits"], file["tokens"]
  path = MODELS / name / "model.gguf"
  got = heptad.bridge("logits", path, tokens=tokens, packed=packed)
  assert support.relative_error(got, want) < 1e-5


@pytest.mark.parametrize("name", make_peft.ADAPTERS)
def test_ours_loads_pefts_adapter(name, heptad):
  model = peft.PeftModel.from_pretrained(peer(make_peft.BASE), MODELS / name)
  tokens = make_peft.tokens()
  with torch.no_grad():
    want = make_peft.loss_and_logits(model, tokens)[1].numpy()
  got = heptad.bridge("logits", MODELS / name, tokens=tokens)
  assert support.relative_error(got, want) < 1e-5


@pytest.mark.parametrize("rotated", [False, True])
def test_peft_loads_our_adapter(rotated, heptad, tmp_path):
  """Over a rotated base, too, whose adapter is one of the base itself."""
  tokens = make_peft.tokens()
  ours = heptad.bridge(
    "adapt",
    MODELS / make_peft.BASE,
    tmp_path / "adapter",
    tokens=tokens,
    rank=3,
    std=0.02,
    rotated=rotated,
  )
  base = peer(make_peft.BASE)
  with torch.no_grad():
    plain = make_peft.loss_and_logits(base, tokens)[1].numpy()
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    want = make_peft.loss_and_logits(model, tokens)[1].numpy()
    merged = make_peft.loss_and_logits(model.merge_and_unload(), tokens)[1]
  assert support.relative_error(plain, want) > 1e-3  # it does something
  assert support.relative_error(ours["logits"], want) < 1e-5
  assert support.relative_error(ours["merged_logits"], merged.numpy()) < 1e-5
  # Kept by PEFT as we wrote them: nothing left at its initial value.
  stored = safetensors.numpy.load_file(
    tmp_path / "adapter" / "adapter_model.safetensors"
  )
  live = {
    make_peft.file_key(k): v
    for k, v in model.named_parameters()
    if "lora_" in k
  }
  for key, value in live.items():
    np.testing.assert_array_equal(value.detach().numpy(), stored[key])


EXPERTS = ["experts/gate", "experts/up", "experts/down"]


@pytest.mark.parametrize("targets", [["q", *EXPERTS], EXPERTS[1:2]])
def test_peft_loads_our_adapter_on_experts(targets, heptad, tmp_path):
  """A gate's factors and its neighbour's become one of twice the rank."""
  tokens, base = make_peft.tokens(), peer("mixtral")
  ours = heptad.bridge(
    "adapt",
    MODELS / "mixtral",
    tmp_path / "adapter",
    tokens=tokens,
    rank=3,
    std=0.1,
    targets=targets,
  )
  with torch.no_grad():
    plain = make_peft.loss_and_logits(base, tokens)[1].numpy()
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    want = make_peft.loss_and_logits(model, tokens)[1].numpy()
    merged = make_peft.loss_and_logits(model.merge_and_unload(), tokens)[1]
  assert support.relative_error(plain, want) > 1e-3
  assert support.relative_error(ours["logits"], want) < 1e-5
  assert support.relative_error(ours["merged_logits"], merged.numpy()) < 1e-5


@pytest.mark.parametrize("name", make_peft.ADAPTERS)
def test_loss_and_gradients(name, heptad, tmp_path):
  with np.load(MODELS / name / "golden.npz") as file:
    want = dict(file)
  out = heptad.bridge(
    "gradients", MODELS / name, tmp_path / "slopes", tokens=want["tokens"]
  )
  assert abs(float(out["loss"]) / float(want["loss"]) - 1) < 1e-5
  got = safetensors.numpy.load_file(
    tmp_path / "slopes" / "adapter_model.safetensors"
  )
  # The truth is fp64; PEFT's own fp32 is up to 7e-6 away from it. Whoever
  # computes in fp32 may be off by 1e-5, or by twice what PEFT is.
  wrapped = make_peft.wrap(
    peer(make_peft.BASE), name, **make_peft.ADAPTERS[name]
  )
  theirs = make_peft.golden(wrapped)
  for key, value in want.items():
    if key.startswith("grad/"):
      error = np.abs(got[key.removeprefix("grad/")] - value).max()
      allowed = max(
        1e-5 * np.abs(value).max(), 2 * np.abs(theirs[key] - value).max()
      )
      assert error <= allowed, key
