"""Writes optimizers.json: what other people's optimizers do to small matrices.

  pip install --no-deps --target DIR bitsandbytes==0.50.2 galore-torch==1.0
  export PYTHONPATH=DIR:APOLLO:Fira
  .venv-peers/bin/python tests/golden/make_optimizers.py

APOLLO and Fira are checkouts of github.com/zhuhanqing/APOLLO and
github.com/xichen-fy/Fira. Parameters and gradients are sines, so that nothing
but that rule has to be shared: element t (from 0, C order) of array n is
size * sin(0.7 t + n); the gradient of array n in step k is
sin(0.3 t^2 + 1.3 n + 2.1 k). All is float64 but what is 8 bits, and PEFT's
LoRA-FA, whose product in bfloat16 is done in float32 here.
"""

import json
import math
import pathlib

import numpy as np
import torch
from bitsandbytes import functional
from torch import nn

STEPS = 6


def value(n, shape, size=0.5):
  t = np.arange(math.prod(shape))
  return torch.tensor(size * np.sin(0.7 * t + n).reshape(shape))


def gradient(n, k, shape):
  t = np.arange(math.prod(shape))
  return torch.tensor(np.sin(0.3 * t**2 + 1.3 * n + 2.1 * k).reshape(shape))


def trained(optimizer, parameters, steps=STEPS):
  """Returns each parameter after the steps, as lists."""
  for k in range(steps):
    for n, p in enumerate(parameters):
      if p.requires_grad:
        p.grad = gradient(n, k, p.shape).to(p.dtype)
    optimizer.step()
  return [p.detach().tolist() for p in parameters]


def projections():
  """GaLore, APOLLO and Fira: a wide, a tall, and an unprojected array.

  With one projector: moments that a second one meets depend on the signs of
  singular vectors, which LAPACK chooses.
  """
  import apollo_torch
  import galore_torch
  from optimizer_torch import fira_adamw

  out = {}
  common = dict(rank=2, update_proj_gap=STEPS)
  cases = {
    "galore": (galore_torch.GaLoreAdamW, dict(scale=0.25, proj_type="std")),
    "galore_reverse": (
      galore_torch.GaLoreAdamW,
      dict(scale=0.25, proj_type="reverse_std"),
    ),
    "apollo": (
      apollo_torch.APOLLOAdamW,
      dict(scale=4.0, proj="svd", proj_type="std", scale_type="channel"),
    ),
    "apollo_mini": (
      apollo_torch.APOLLOAdamW,
      dict(scale=4.0, proj="svd", proj_type="std", scale_type="tensor", rank=1),
    ),
    "fira": (fira_adamw.AdamW, dict(alpha=0.25, proj_type="std")),
  }
  for name, (make, fields) in cases.items():
    shapes = [(5, 8), (7, 4), (6,)]
    parameters = [
      nn.Parameter(value(n, s).float()) for n, s in enumerate(shapes)
    ]
    groups = [
      {"params": parameters[:2], **common, **fields},
      {"params": parameters[2:]},
    ]
    # Tiny: torch adds it before, optax after the correction of the bias.
    optimizer = make(groups, lr=0.1, betas=(0.8, 0.9), eps=1e-12)
    out[name] = trained(optimizer, parameters)
  return out


class Tiny(nn.Module):
  def __init__(self):
    super().__init__()
    self.embed = nn.Embedding(7, 4)
    self.up = nn.Linear(4, 6)
    self.norm = nn.LayerNorm(6)


def adapted(targets=("embed", "up"), bias="none"):
  import peft

  config = peft.LoraConfig(
    r=2,
    lora_alpha=3,
    target_modules=list(targets),
    alpha_pattern={"up": 5},
    bias=bias,
    modules_to_save=["norm"] if bias == "all" else None,
  )
  return peft.get_peft_model(Tiny(), config).double()


def peft_optimizers():
  from peft import optimizers
  from peft.optimizers import lorafa

  lorafa.is_bf16_available = lambda: False

  def loraplus(model):
    return optimizers.create_loraplus_optimizer(
      model,
      torch.optim.AdamW,
      lr=0.01,
      loraplus_lr_ratio=4,
      loraplus_weight_decay=0.1,
      loraplus_lr_embedding=0.003,
    )

  def riemannian(model):
    return optimizers.create_riemannian_optimizer(
      model, torch.optim.AdamW, lr=0.01, reg=0.01, weight_decay=0.1
    )

  def lora_fa(model):
    made = optimizers.create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=0.01)
    made.param_groups[0]["eps"] = 1e-12
    return made

  out = {}
  for make in (loraplus, riemannian, lora_fa):
    if make is loraplus:
      model = adapted(bias="all")
    else:
      model = adapted(("up",) if make is lora_fa else ("embed", "up"))
    optimizer = make(model)
    named = [
      (n, p)
      for n, p in model.named_parameters()
      if "lora_" in n or p.requires_grad
    ]
    for n, (_, p) in enumerate(named):
      with torch.no_grad():
        p.copy_(value(n, p.shape))
    done = trained(optimizer, [p for _, p in named])
    out[make.__name__] = {
      name: x for (name, _), x in zip(named, done, strict=True)
    }
  return out


def eight_bits():
  """The map, codes of numbers, and Adam's steps on the CPU."""
  signed = functional.create_dynamic_map(signed=True)
  unsigned = functional.create_dynamic_map(signed=False)
  n = 600
  x = value(0, (n,)).float() ** 3
  codes, state = functional.quantize_blockwise(x, code=signed, blocksize=256)
  p = value(1, (n,)).float()
  m, v = (torch.zeros(n, dtype=torch.uint8) for _ in range(2))
  m.fill_(int((signed == 0).nonzero()[0]))
  tops = [torch.zeros(3) for _ in range(2)]
  for k in range(1, STEPS + 1):
    functional.optimizer_update_8bit_blockwise(
      "adam",
      gradient(1, k, (n,)).float(),
      p,
      m,
      v,
      0.9,
      0.999,
      0.0,
      0.0,
      1e-8,
      k,
      0.01,
      signed,
      unsigned,
      tops[0],
      tops[1],
      weight_decay=0.1,
    )
  return {
    "signed": signed.tolist(),
    "unsigned": unsigned.tolist(),
    "codes": codes.tolist(),
    "absmax": state.absmax.tolist(),
    "p": p.tolist(),
    "m": m.tolist(),
    "v": v.tolist(),
    "tops": [x.tolist() for x in tops],
  }


if __name__ == "__main__":
  found = {
    "projections": projections(),
    "peft": peft_optimizers(),
    "eight_bits": eight_bits(),
  }
  path = pathlib.Path(__file__).with_name("optimizers.json")
  path.write_text(json.dumps(found) + "\n")
