"""Writes conv.npz: what PEFT's adapters on a convolution compute.

  .venv-peers/bin/python tests/golden/make_conv.py

A convolution of 4 to 6 channels with a window of 2 x 3, strides and padding;
its twin's window is its strides, as in a vision tower's patch embedding. Of
each method: the adapter's tensors, outputs, and the merged kernel.
"""

import pathlib

import numpy as np
import peft
import torch
from torch import nn

CASES = {
  "lora": dict(kind="LoraConfig", r=3, lora_alpha=5),
  "rslora": dict(kind="LoraConfig", r=3, lora_alpha=5, use_rslora=True),
  "dora": dict(kind="LoraConfig", r=3, lora_alpha=5, use_dora=True),
  "loha": dict(kind="LoHaConfig", r=3, alpha=5),
  "lokr": dict(kind="LoKrConfig", r=8, alpha=5),
  "lokr_low": dict(kind="LoKrConfig", r=1, alpha=5, decompose_factor=2),
}
LAYERS = {
  "any": dict(kernel_size=(2, 3), stride=(2, 1), padding=(1, 2)),
  "patch": dict(kernel_size=(2, 3), stride=(2, 3)),
}


def sines(shape, phase, size=0.5):
  t = np.arange(int(np.prod(shape)))
  return torch.tensor(
    size * np.sin(0.7 * t**1.1 + phase).reshape(shape), dtype=torch.float32
  )


class Tiny(nn.Module):
  def __init__(self, fields):
    super().__init__()
    self.conv = nn.Conv2d(4, 6, **fields)

  def forward(self, x):
    return self.conv(x)


def main():
  out = {"x": sines((2, 4, 7, 9), 0.3, 1.0).numpy()}
  for layer, fields in LAYERS.items():
    for name, options in CASES.items():
      base, options = Tiny(fields), dict(options)
      with torch.no_grad():
        base.conv.weight.copy_(sines(base.conv.weight.shape, 1.0))
        base.conv.bias.copy_(sines((6,), 2.0))
      config = getattr(peft, options.pop("kind"))(
        target_modules=["conv"], **options
      )
      model = peft.get_peft_model(base, config).eval()
      with torch.no_grad():
        for i, (key, p) in enumerate(model.named_parameters()):
          if "base_layer" not in key:
            scale = 0.1 if "magnitude" in key else 0.5
            p.copy_(p + sines(p.shape, i, scale))
      tensors = peft.get_peft_model_state_dict(model)
      for key, x in tensors.items():
        short = key.removeprefix("base_model.model.conv.")
        out[f"{layer}/{name}/tensors/{short}"] = x.numpy()
      x = torch.tensor(out["x"])
      with torch.no_grad():
        out[f"{layer}/{name}/y"] = model(x).numpy()
        merged = model.merge_and_unload()
        out[f"{layer}/{name}/merged"] = merged.conv.weight.numpy().copy()
  out["kernel"] = sines((6, 4, 2, 3), 1.0).numpy()
  out["bias"] = sines((6,), 2.0).numpy()
  file = pathlib.Path(__file__).with_name("conv.npz")
  np.savez_compressed(file, **out)


if __name__ == "__main__":
  main()
