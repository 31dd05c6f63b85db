"""What ways to fine-tune Llama-2-7B hold in memory: rows of a table.

No flags; `lora_methods --memory` prints them. From shapes alone;
activations are apart, which `experiments.plan` says of a run.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from research.lora import adapt
from research.lora.diagnosis import memory
from research.lora.methods.lora import LoRA
from research.nn import presets
from research.quant.formats.codebook import Codebook
from research.quant.quantize import Cast, Quantize

LLAMA2_7B = presets.Sizes(
  vocab=32000,
  width=4096,
  depth=32,
  heads=32,
  kv_heads=32,
  head_dim=128,
  hidden=11008,
  tied=False,
)

COLUMNS = ("setup", "weights", "gradients", "master", "optimizer", "total")


def shapes(sizes: presets.Sizes = LLAMA2_7B) -> Any:
  """Returns the shapes of a model's parameters."""
  model = presets.transformer(presets.FAMILIES["llama"], sizes)
  tokens = jnp.zeros((1, 2), jnp.int32)
  return jax.eval_shape(lambda: model.init(jax.random.key(0), tokens)["params"])


def setups() -> dict[str, memory.Memory]:
  """Returns what each setup takes, by its name."""
  params = shapes()

  def full(precision):
    return memory.lora_memory(params, trainable=".", precision=precision)

  def lora(rank, targets: str | Sequence[str] = adapt.ALL_LINEAR, *packed):
    how = adapt.Adapt(method=LoRA(rank=rank), targets=targets)
    return memory.lora_memory(params, (Cast(), *packed, how))

  def qlora(rank, nested):
    return lora(
      rank, adapt.ALL_LINEAR, Quantize(format=Codebook(nested=nested))
    )

  def galore(**how):
    return memory.galore_memory(params, 1024, **how)

  twice, once = "NF4 with double quantization", "NF4, one level"
  return {
    "full, 16 bits with a float32 master": full(memory.MIXED),
    "full, all in 16 bits": full(memory.HALF),
    "LoRA r = 8 on q, v": lora(8, ("q", "v")),
    "LoRA r = 16 on all": lora(16),
    "LoRA r = 64 on all": lora(64),
    "LoRA r = 256 on all": lora(256),
    f"QLoRA r = 16, {twice}": qlora(16, 256),
    f"QLoRA r = 64, {twice}": qlora(64, 256),
    f"QLoRA r = 64, {once}": qlora(64, 0),
    "GaLore r = 1024, 16-bit moments": galore(),
    "GaLore r = 1024, 8-bit moments, layer by layer": galore(
      state=1, layerwise=True
    ),
  }


def table() -> list[list[str]]:
  """Returns the cells of the table in decimal GB, its head first."""
  out = [list(COLUMNS)]
  for name, found in setups().items():
    parts = (found.frozen, found.learned)
    weights = " + ".join(_gb(x) for x in parts if x)
    rest = (found.gradients, found.master, found.optimizer)
    out.append([name, weights, *map(_gb, rest), f"{found.total / 1e9:.1f}"])
  return out


def _gb(size: int) -> str:
  return f"{size / 1e9:.2f}" if size else ""
