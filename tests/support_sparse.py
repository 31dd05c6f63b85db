"""Checkpoints of real sizes as sparse files that take no disk space."""

import json
import math
import os
import pathlib

from research.interop import hf, parts
from research.interop.hf import config as hf_config
from research.io import safetensors
from research.nn import presets

LLAMA_8B = dict(
  model_type="llama",
  vocab_size=128256,
  hidden_size=4096,
  intermediate_size=14336,
  num_hidden_layers=32,
  num_attention_heads=32,
  num_key_value_heads=8,
  max_position_embeddings=8192,
  rope_theta=500000.0,
  rms_norm_eps=1e-5,
  tie_word_embeddings=False,
)
"""config.json of Llama 3 8B."""


def write(folder: pathlib.Path, config: dict, layers: int = 4) -> None:
  """Writes a Hugging Face directory of bfloat16 zeros.

  Args:
    folder: Existing folder.
    config: The model's config.json.
    layers: Number of layers per file.
  """
  model = presets.transformer(*hf_config.sizes_from_config(config))
  rows, files, where = hf.table(model), {}, {}
  for slot in parts.slots(model):
    for address in slot.addresses:
      name, transposed = rows.theirs(address)
      file = f"model-{(address.layer or 0) // layers:05d}.safetensors"
      shape = slot.one[::-1] if transposed else slot.one
      files.setdefault(file, {})[name] = shape
      where[name] = file
  for file, shapes in files.items():
    header, end = {}, 0
    for name, shape in shapes.items():
      extent = [end, end + 2 * math.prod(shape)]
      header[name] = dict(dtype="BF16", shape=list(shape), data_offsets=extent)
      end = extent[1]
    raw = json.dumps(header).encode()
    (folder / file).write_bytes(len(raw).to_bytes(8, "little") + raw)
    os.truncate(folder / file, 8 + len(raw) + end)
  safetensors.write_json(folder / safetensors.INDEX, dict(weight_map=where))
  safetensors.write_json(folder / "config.json", config)
