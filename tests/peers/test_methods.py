"""Adapters of every method, read here, written, and loaded by PEFT live."""

import families
import make_models
import make_peft
import make_peft_methods
import numpy as np
import peft
import pytest
import safetensors.numpy
import support
import torch
from peft.utils import set_peft_model_state_dict

# Several factors of BOFT run in PEFT by a CUDA extension only.
ADAPTERS = [
  name for name in make_peft_methods.ADAPTERS if name != "boft_factors"
]


def computed(model, tokens) -> np.ndarray:
  with torch.no_grad():
    return make_peft.loss_and_logits(model, tokens)[1].numpy()


def base(name=make_peft.BASE):
  family = families.FAMILIES[name]
  return make_models.build(family.config, make_models.weights(family))


def check(folder, want, tokens, under=make_peft.BASE) -> None:
  """PEFT finds in the folder just what it looks for, and computes the same."""
  config = peft.PeftConfig.from_pretrained(folder)
  model = peft.get_peft_model(base(under), config)
  stored = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
  tensors = {k: torch.from_numpy(v) for k, v in stored.items()}
  found = set_peft_model_state_dict(model, tensors)
  assert not found.unexpected_keys
  prefix = model.base_model.prefix
  missing = [k for k in found.missing_keys if prefix in k]
  # Of RandLoRA's and TinyLoRA's, each module's is the one that all share.
  shared = ("randlora_", "tinylora_v")
  missing = [
    k
    for k in missing
    if "layers" not in k or not any(name in k for name in shared)
  ]
  assert not missing
  loaded = peft.PeftModel.from_pretrained(base(under), folder)
  assert support.relative_error(computed(loaded, tokens), want) < 2e-5
  if config.to_dict().get("alora_invocation_tokens"):
    return  # has no merged form
  merged = loaded.merge_and_unload()
  assert support.relative_error(computed(merged, tokens), want) < 2e-5


@pytest.mark.parametrize("under", make_peft_methods.BASES)
def test_peft_loads_what_we_wrote(under, heptad, tmp_path):
  tokens = make_peft.tokens(12)
  names = [make_peft_methods.BASES[under] + name for name in ADAPTERS]
  heptad.bridge(
    "rewrite",
    make_models.MODELS / under,
    tmp_path / "written",
    names=np.array(names),
    folder=np.array(str(make_models.MODELS)),
  )
  for name in names:
    with np.load(make_models.MODELS / name / "golden.npz") as file:
      check(tmp_path / "written" / name, file["logits"], tokens, under)


@pytest.mark.parametrize("method", ["PiSSA", "OLoRA", "MiCA", "LoRAFA"])
def test_peft_loads_starts_as_plain_lora(method, heptad, tmp_path):
  tokens = make_peft.tokens(12)
  ours = heptad.bridge(
    "start",
    make_models.MODELS / make_peft.BASE,
    tmp_path / "adapter",
    tokens=tokens,
    method=np.array(method),
  )
  assert support.relative_error(computed(base(), tokens), ours["logits"]) > 1e-3
  check(tmp_path / "adapter", ours["logits"], tokens)
