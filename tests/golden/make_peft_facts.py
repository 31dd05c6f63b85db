"""Writes peft_facts.json: which types PEFT has, and how LoRA-GA starts there.

.venv-peers/bin/python tests/golden/make_peft_facts.py [--to FILE]

version  PEFT's
types    of all of its methods
lora_ga  weight, gradient [out, in]; A, B and the base's new weight, as
         PEFT's own initialisation leaves them. Its randomised decomposition
         is exact here: it takes as many vectors as the matrix has.
"""

import argparse
import json
import pathlib

import numpy as np
import peft
import torch

SIZE_OUT, SIZE_IN, RANK = 12, 10, 3


def lora_ga() -> dict:
  """Returns a layer before and after PEFT has put LoRA-GA on it."""
  torch.manual_seed(0)  # vectors' signs follow from it
  rng = np.random.default_rng(17)
  weight, gradient = rng.standard_normal((2, SIZE_OUT, SIZE_IN))
  base = torch.nn.Sequential(torch.nn.Linear(SIZE_IN, SIZE_OUT, bias=False))
  base[0].weight.data = torch.tensor(weight, dtype=torch.float32)
  base[0]._peft_loraga_grad = torch.tensor(gradient, dtype=torch.float32)
  config = peft.LoraConfig(
    r=RANK,
    lora_alpha=6,
    use_rslora=True,
    target_modules=["0"],
    init_lora_weights="lora_ga",
    lora_ga_config=peft.LoraGAConfig(
      direction="ArB2r", scale="stable", stable_gamma=16
    ),
  )
  layer = peft.get_peft_model(base, config).base_model.model[0]
  arrays = dict(
    weight=weight,
    gradient=gradient,
    a=layer.lora_A["default"].weight,
    b=layer.lora_B["default"].weight,
    left=layer.base_layer.weight,
  )
  out = {
    name: np.asarray(torch.as_tensor(x).detach(), np.float32).tolist()
    for name, x in arrays.items()
  }
  return out | dict(rank=RANK, alpha=6.0, gamma=16.0)


def facts() -> dict:
  """Returns what the file holds."""
  types = sorted(kind.value for kind in peft.PeftType)
  return dict(version=peft.__version__, types=types, lora_ga=lora_ga())


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  place = pathlib.Path(__file__).with_name("peft_facts.json")
  parser.add_argument("--to", type=pathlib.Path, default=place)
  args = parser.parse_args()
  torch.set_num_threads(1)
  found = facts()
  args.to.write_text(json.dumps(found, separators=(",", ":")) + "\n")
  print(found["version"], len(found["types"]), "types")


if __name__ == "__main__":
  main()
