"""Writes an adapter of each of PEFT's methods, and what PEFT says of them.

  .venv-peers/bin/python tests/golden/make_peft_methods.py [--to DIR]
      [--base BASE] [NAME ...]

Each folder is an adapter over a base of `BASES` as PEFT saves it, with
golden.npz beside it: the arrays of make_peft.py but base_logits, and gradients
of what is trained. They are computed in fp64 from the folder as PEFT loads it
again. One base has a bias on every matrix of a layer: what a method does to an
output, it does or does not do to that.

What is trained is drawn: around 0, or around its start where that is another
constant (magnitudes, gains, bounds). BOFT's product of several factors needs a
CUDA extension in PEFT; it is `torch.block_diag`, which stands in for it here.
C3A's backward pass of PEFT 0.21.2 is not the gradient of its forward pass in
the input (finite differences say so); torch's gradient of its own circulant
matrix stands in.
"""

import argparse
import dataclasses
import pathlib
import sys
import zlib

import numpy as np
import peft
import peft.tuners.boft.layer as boft_layer
import peft.tuners.c3a.layer as c3a_layer
import safetensors.numpy
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import families  # noqa: E402
import make_models  # noqa: E402
import make_peft  # noqa: E402

ADAPTERS = {
  "dora": peft.LoraConfig(r=4, lora_alpha=12, use_dora=True),
  "kasa": peft.LoraConfig(
    r=4, lora_alpha=12, kasa_config=peft.KasaConfig(beta=2e-4)
  ),
  "adalora": peft.AdaLoraConfig(
    init_r=6, target_r=4, lora_alpha=12, total_step=20, tinit=2, tfinal=3
  ),
  "adalora_cut": peft.AdaLoraConfig(
    init_r=6, target_r=4, lora_alpha=12, total_step=20
  ),
  "hira": peft.HiraConfig(
    r=4, rank_pattern={r"^model\.layers\.1\.self_attn\.q_proj": 2}
  ),
  "loha": peft.LoHaConfig(
    r=4, alpha=6, alpha_pattern={r"^model\.layers\.1\.self_attn\.q_proj": 3}
  ),
  "lokr": peft.LoKrConfig(r=2, alpha=6),
  "lokr_both": peft.LoKrConfig(
    r=1, alpha=6, decompose_both=True, decompose_factor=8
  ),
  "lokr_whole": peft.LoKrConfig(r=40, alpha=6),
  "vera": peft.VeraConfig(r=8),
  "ia3": peft.IA3Config(feedforward_modules=["down_proj"]),
  "miss": peft.MissConfig(r=6),
  "gralora": peft.GraloraConfig(r=4, alpha=8, gralora_k=2),
  "c3a": peft.C3AConfig(block_size=4),
  "shira": peft.ShiraConfig(r=4, random_seed=5),
  "fourierft": peft.FourierFTConfig(n_frequency=50, scaling=20.0),
  "delora": peft.DeloraConfig(
    r=4,
    delora_lambda=4,
    rank_pattern={r"^model\.layers\.1\.self_attn\.q_proj": 2},
    lambda_pattern={r"^model\.layers\.0\.self_attn\.v_proj": 2},
  ),
  "randlora": peft.RandLoraConfig(r=6, randlora_alpha=6),
  "oft": peft.OFTConfig(oft_block_size=4),
  "oft_exact": peft.OFTConfig(oft_block_size=2, use_cayley_neumann=False),
  "boft": peft.BOFTConfig(boft_block_size=4),
  "boft_factors": peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3),
  "hra": peft.HRAConfig(r=4),
  "tinylora": peft.TinyLoraConfig(r=2, u=5),
  "bdlora": peft.LoraConfig(
    r=4,
    lora_alpha=12,
    use_bdlora=peft.BdLoraConfig(
      target_modules_bd_a=["down_proj"],
      target_modules_bd_b=["q_proj", "v_proj"],
      nblocks=2,
    ),
  ),
  # Once in a row of the tokens, not at all in the other.
  "alora": peft.LoraConfig(
    r=4, lora_alpha=12, alora_invocation_tokens=[34, 12]
  ),
}
BASES = {make_peft.BASE: "method_", "llama_biases": "biased_"}
"""Base -> how the folders of its adapters begin."""

TARGETS = ["q_proj", "v_proj", "down_proj"]
TARGETS_OF = {
  "randlora": ["q_proj", "v_proj", "up_proj", "down_proj"],
  "boft_factors": ["q_proj", "v_proj"],
}
OF_BASE = {
  # Widths are 36 and 44: 18 and 22 blocks, which two factors divide.
  ("llama_biases", "boft_factors"): dict(boft_n_butterfly_factor=2),
}
"""What a base needs otherwise than `ADAPTERS` has it."""

AROUND_START = (
  *("magnitude", "ia3_l", "boft_s", "delora_lambda", "vera_lambda_d"),
  "randlora_gamma",
)
DEVIATION = {
  "lora_B": 0.03,
  "hra_u": 1.0,
  "fourierft": 1.0,
  "miss": 0.02,
  "shira": 0.05,
  "c3a": 0.5,
  "boft_R": 0.2,
  "lokr": 0.15,
  "hira_B": 0.15,
  "tinylora_v": 0.3,
}


class Blocks:
  """Stands in for PEFT's CUDA extension."""

  @staticmethod
  def apply(x):
    return torch.stack([torch.block_diag(*blocks) for blocks in x])


class Circulant:
  """Stands in for PEFT's convolution."""

  @staticmethod
  def apply(x, w):
    return x @ c3a_layer.get_circulant_fast(w).T


def config(name: str, base: str):
  """Returns PEFT's configuration of a case."""
  out = dataclasses.replace(ADAPTERS[name], **OF_BASE.get((base, name), {}))
  out.task_type = "CAUSAL_LM"
  out.target_modules = set(TARGETS_OF.get(name, TARGETS))
  return out


def draw(wrapped, name: str) -> None:
  """Sets everything that is trained to numbers of its own name."""
  prefix = wrapped.base_model.prefix
  for key, value in wrapped.named_parameters():
    if prefix not in key or not value.requires_grad:
      continue
    generator = np.random.default_rng([zlib.crc32(f"{name}/{key}".encode())])
    std = next((s for k, s in DEVIATION.items() if k in key), 0.1)
    new = std * generator.standard_normal(tuple(value.shape))
    if any(part in key for part in AROUND_START):
      new = value.detach().double().numpy() * (1 + new)
    value.data.copy_(torch.from_numpy(new.astype(np.float32)))


def cut(wrapped) -> None:
  """Zeroes some of AdaLoRA's terms and says so, as its allocator does."""
  pattern = {}
  for i, (key, value) in enumerate(wrapped.base_model.model.named_parameters()):
    if "lora_E" in key:
      rows = [(i + j) % 3 > 0 or j == i % 6 for j in range(len(value))]
      value.data[~torch.tensor(rows)] = 0
      pattern[key] = rows
  wrapped.peft_config["default"].rank_pattern = pattern


def stored_name(key: str, stored) -> str:
  """Returns the name in the file of a live parameter."""
  if ".tinylora_v." in key:  # of all modules, found in the first
    return f"base_model.tinylora_v.{key.rsplit('.', 1)[-1]}"
  plain = key.replace(".default", "")
  return plain if plain in stored else plain.removesuffix(".weight")


def golden(folder: pathlib.Path, base: str) -> dict[str, np.ndarray]:
  """Returns the arrays of golden.npz, in fp64 of the adapter in `folder`."""
  family = families.FAMILIES[base]
  stored = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
  rows = make_peft.tokens(12)
  with make_models.float64():
    double = make_models.build(
      family.config, make_models.weights(family), torch.float64
    )
  model = peft.PeftModel.from_pretrained(
    double, folder, is_trainable=True, autocast_adapter_dtype=False
  ).double()
  # Some methods make zeros of the default type.
  torch.set_default_dtype(torch.float64)
  with make_models.float64():
    loss, logits = make_peft.loss_and_logits(model, rows)
    loss.backward()
    out = {
      f"grad/{stored_name(k, stored)}": v.grad
      for k, v in model.named_parameters()
      if v.grad is not None and "ranknum" not in k
    }
    model.zero_grad()
    merged = logits  # an activated adapter has no other form
    if not model.active_peft_config.to_dict().get("alora_invocation_tokens"):
      with torch.no_grad():
        merged = make_peft.loss_and_logits(model.merge_and_unload(), rows)[1]
  torch.set_default_dtype(torch.float32)
  if not {k.removeprefix("grad/") for k in out} <= set(stored):
    raise ValueError("gradients of what the file does not hold")
  out |= dict(logits=logits, merged_logits=merged, loss=loss)
  out = {k: v.detach().numpy().astype(np.float32) for k, v in out.items()}
  return out | dict(tokens=rows)


def make(name: str, base: str, to: pathlib.Path = make_models.MODELS) -> dict:
  """Writes one adapter's folder; returns its golden arrays."""
  family = families.FAMILIES[base]
  folder = to / f"{BASES[base]}{name}"
  torch.manual_seed(0)  # of what is not trained
  single = make_models.build(family.config, make_models.weights(family))
  wrapped = peft.get_peft_model(single, config(name, base))
  draw(wrapped, name)
  if name == "adalora_cut":
    cut(wrapped)
  wrapped.save_pretrained(folder)
  make_peft.settle(folder, f"../{base}")
  arrays = golden(folder, base)
  np.savez_compressed(folder / "golden.npz", **arrays)
  return arrays


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", default=None)
  parser.add_argument("--to", type=pathlib.Path, default=make_models.MODELS)
  parser.add_argument("--base", choices=BASES, action="append")
  args = parser.parse_args()
  torch.set_num_threads(1)
  boft_layer.get_fbd_cuda = lambda: True
  boft_layer.FastBlockDiag = Blocks
  c3a_layer.BlockCircularConvolution = Circulant
  for base in args.base or BASES:
    for name in args.names or ADAPTERS:
      arrays = make(name, base, args.to)
      fidelity = np.abs(arrays["logits"] - arrays["merged_logits"]).max()
      print(
        f"{base}, {name}: loss {arrays['loss']:.6f}, logits "
        f"{np.ptp(arrays['logits']):.2f} wide, merged differs by "
        f"{fidelity:.1e}",
        flush=True,
      )


if __name__ == "__main__":
  main()
