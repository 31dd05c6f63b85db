"""GGUF metadata: a family and its sizes, both ways.

Every key of a file is used or refused, and what is written is read back and has
to give the same model. What an architecture says without a key is in
`architectures`, rotations are in `rope`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.interop.gguf import rope as gguf_rope
from research.interop.gguf.architectures import (
  ARCHITECTURES,
  OF_MODEL_TYPE,
  Architecture,
  model_type,
)
from research.interop.gguf.container import GGUF, Tensor
from research.interop.gguf.names import ROPE_FACTORS
from research.interop.hf import config as hf_config
from research.interop.hf.families import MODEL_TYPES
from research.nn import presets
from research.nn.block import Block
from research.nn.moe import Moe
from research.nn.moe.routing import Routing
from research.nn.rope import Linear, Scaling, Yarn
from research.nn.transformer import Transformer
from research.typing import UserError

NO_TOKENIZER: Mapping[str, Any] = {"tokenizer.ggml.model": "none"}
"""The keys of no tokenizer; a file without any is none that llama.cpp opens."""

_SILENT = (
  "vocab_size",
  "tensor_data_layout",
  "rope.scaling.finetuned",
  "attention.value_length",
)
"""Keys that repeat what tensors say, or describe history."""

_BIASES = {
  "qkv_bias": "blk.0.attn_q.bias",
  "out_bias": "blk.0.attn_output.bias",
  "mlp_bias": "blk.0.ffn_up.bias",
}


class _Keys:
  """An architecture's keys, which remembers those that were asked for."""

  def __init__(self, path: str, metadata: Mapping[str, Any], architecture: str):
    self.path, self.prefix = path, architecture + "."
    self.left = {
      k.removeprefix(self.prefix): v
      for k, v in metadata.items()
      if k.startswith(self.prefix)
    }
    for key in _SILENT:
      self.left.pop(key, None)

  def fail(self, key: str, found: Any, expected: str):
    raise UserError(
      f"{self.path}: {self.prefix}{key}: found {repr(found)[:60]}, "
      f"expected {expected}"
    )

  def integer(self, key: str, default: int | None = None) -> int | None:
    """Returns a positive integer, the same for all layers."""
    value = self.left.pop(key, default)
    if isinstance(value, np.ndarray) and value.size and np.ptp(value) == 0:
      value = value[0].item()
    if value is None or value is default:
      return default
    if type(value) is not int or value < 1:
      self.fail(key, value, "one positive integer")
    return value

  def needed(self, key: str) -> int:
    value = self.integer(key)
    if value is None:
      self.fail(key, "nothing", "a positive integer")
    return value

  def real(self, key: str, default: float | None = None) -> float | None:
    """Returns a positive number: the shortest decimal of the float32."""
    value = self.left.pop(key, default)
    if value is None or value is default:
      return default
    if type(value) not in (int, float) or not 0 < value < np.inf:
      self.fail(key, value, "a positive number")
    return float(str(np.float32(value)))

  def text(self, key: str, default: str) -> str:
    return str(self.left.pop(key, default))

  def finish(self) -> None:
    """Raises for keys that nothing asked for: they may change the model."""
    for key, value in self.left.items():
      if type(value) in (int, float, bool) and not value:
        continue  # says that the feature is off
      self.fail(key, value, "no such key: this feature is not supported")


def sizes_from_metadata(
  path: str, file: GGUF
) -> tuple[presets.Family, presets.Sizes, bool]:
  """Returns family, sizes, and whether query and key rows are interleaved.

  Raises:
    UserError: unknown architecture, a missing, malformed or unknown key.
  """
  name = file.metadata.get("general.architecture")
  if name == "clip":
    raise UserError(
      f"{path}: general.architecture: found 'clip', an image encoder alone"
      " (llama.cpp's mmproj), expected a language model's file. Load a vision"
      " language model from a directory in Hugging Face's format"
    )
  if name not in ARCHITECTURES:
    raise UserError(
      f"{path}: general.architecture: found {name!r}, "
      f"supported: {', '.join(ARCHITECTURES)}"
    )
  kind = ARCHITECTURES[name]
  keys = _Keys(path, file.metadata, name)
  embed = file.tensors.get("token_embd.weight")
  if embed is None or len(embed.shape) != 2:
    raise UserError(f"{path}: no matrix 'token_embd.weight'")
  width, depth = keys.needed("embedding_length"), keys.needed("block_count")
  if depth > len(file.tensors):
    keys.fail("block_count", depth, f"at most the {len(file.tensors)} tensors")
  heads = keys.needed("attention.head_count")
  head_dim = keys.integer("attention.key_length", max(width // heads, 1))
  theta = keys.real("rope.freq_base", 10_000.0)
  window = keys.integer("attention.sliding_window", kind.window)
  rotated = keys.integer("rope.dimension_count", head_dim)
  if rotated != head_dim:
    keys.fail("rope.dimension_count", rotated, f"the head's {head_dim}")
  hidden = keys.needed("feed_forward_length")
  sparse = _experts(keys, kind, hidden)
  family = dataclasses.replace(
    presets.FAMILIES[MODEL_TYPES[model_type(file.metadata)].preset],
    **{flag: tensor in file.tensors for flag, tensor in _BIASES.items()},
  )
  scaled = depth in kind.scaled_by_width
  sizes = presets.Sizes(
    vocab=embed.shape[0],
    width=width,
    depth=depth,
    heads=heads,
    kv_heads=keys.integer("attention.head_count_kv", heads),
    hidden=hidden,
    sparse=sparse,
    head_dim=head_dim,
    theta=theta,
    scaling=_scaling(keys, file, theta, head_dim),
    local_theta=keys.real("rope.freq_base_swa", kind.local_theta),
    window=window,
    eps=keys.real("attention.layer_norm_rms_epsilon", 1e-5),
    tied="output.weight" not in file.tensors,
    attention_scale=(width / heads) ** -0.5 if scaled else None,
    attention_softcap=keys.real(
      "attn_logit_softcapping", kind.attention_softcap
    ),
    logit_softcap=keys.real("final_logit_softcapping", kind.logit_softcap),
    pattern=_pattern(keys, family, depth),
    max_positions=keys.integer("context_length"),
  )
  if sizes.heads % sizes.kv_heads:
    keys.fail("attention.head_count_kv", sizes.kv_heads, f"to divide {heads}")
  keys.finish()
  return family, sizes, kind.interleaved


def has_tokenizer(metadata: Mapping[str, Any]) -> bool:
  """Whether a file has a tokenizer, of whatever kind."""
  kind = metadata.get("tokenizer.ggml.model", "none")
  return not isinstance(kind, str) or kind not in ("none", "no_vocab")


def _experts(
  keys: _Keys, architecture: Architecture, hidden: int
) -> presets.Sparse | None:
  """Returns the experts that a file's keys describe, or None.

  Raises:
    UserError: a key is missing, or more experts are used than there are.
  """
  own = architecture.expert_size
  if not own and not keys.left.get("expert_count"):
    return None
  experts = keys.needed("expert_count")
  active = keys.needed("expert_used_count")
  if active > experts:
    keys.fail("expert_used_count", active, f"at most the {experts} experts")
  if own:
    hidden = keys.needed("expert_feed_forward_length")
  routing = Routing(experts=experts, active=active)
  return presets.Sparse(routing=routing, hidden=hidden)


def _pattern(
  keys: _Keys, family: presets.Family, depth: int
) -> tuple[str, ...] | None:
  every = keys.integer("attention.sliding_window_pattern")
  if every is None or "local" not in family.pattern:
    return None
  if every > depth:  # no layer is global
    return ("local",)
  return ("local",) * (every - 1) + ("global",)


def _scaling(keys: _Keys, file: GGUF, theta: float, dim: int) -> Scaling | None:
  """Returns the rotation's extension, by keys or by its factors."""
  # A factor without a type is a linear one to llama.cpp.
  kind = keys.text("rope.scaling.type", "linear")
  factor = keys.real("rope.scaling.factor")
  original = keys.integer("rope.scaling.original_context_length")
  factors = file.tensors.get(ROPE_FACTORS)
  if factors is not None:
    found = factors.decode().reshape(-1)
    return gguf_rope.llama3_from_factors(keys.path, found, theta, dim, original)
  if kind == "none" or factor in (None, 1.0):
    return None
  if kind == "linear":
    return Linear(factor=factor)
  if kind != "yarn":
    keys.fail("rope.scaling.type", kind, "none, linear or yarn")
  if original is None:
    keys.fail("rope.scaling.original_context_length", "nothing", "an integer")
  return Yarn(
    factor=factor,
    original=original,
    fast=keys.real("rope.scaling.yarn_beta_fast", 32.0),
    slow=keys.real("rope.scaling.yarn_beta_slow", 1.0),
  )


def metadata_from_model(
  model: Transformer, hint: str | None, name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """Returns the metadata of `model`, and tensors that belong to it.

  Inverts `sizes_from_metadata`; `check_described` reads it back.

  Raises:
    UserError: GGUF has no way to say what this model computes.
  """
  kind = hf_config.describe(model, hint)["model_type"]
  arch = OF_MODEL_TYPE.get(kind)
  if arch is None:
    raise UserError(
      f"GGUF: no architecture for model_type {kind!r}; expected one of "
      f"{', '.join(OF_MODEL_TYPE)}"
    )
  kinds = model.layer_kinds()
  full = next((k for k in kinds if k.attention.window is None), kinds[0])
  a = full.attention
  out: dict[str, Any] = {
    "vocab_size": model.vocab_size,
    "context_length": model.max_positions or 2_048,
    "embedding_length": model.width,
    "block_count": len(kinds),
    "feed_forward_length": full.mlp.hidden,
    "attention.head_count": a.heads,
    "attention.head_count_kv": a.kv_heads,
    "attention.key_length": a.head_dim,
    "attention.value_length": a.head_dim,
    "attention.layer_norm_rms_epsilon": float(model.norm.eps),
    "rope.dimension_count": a.head_dim,
    "rope.freq_base": float(a.rope.theta),
  }
  out |= _windows(model, arch) | _expert_keys(kinds, arch)
  for key, value in (
    ("attn_logit_softcapping", a.softcap),
    ("final_logit_softcapping", model.softcap),
  ):
    if value is not None:
      out[key] = float(value)
  keys, extra = gguf_rope.to_metadata(a)
  found = {"general.architecture": arch, "general.name": name}
  found |= {"general.quantization_version": 2}
  found |= {f"{arch}.{key}": value for key, value in (out | keys).items()}
  return found, extra


def _windows(model: Transformer, arch: str) -> dict[str, Any]:
  attentions = [k.attention for k in model.layer_kinds()]
  local = [a for a in attentions if a.window is not None]
  if not local:
    return {}
  out: dict[str, Any] = {"attention.sliding_window": local[0].window}
  if arch == "gemma3":
    out["rope.freq_base_swa"] = float(local[0].rope.theta)
  if arch.startswith("gemma"):
    full = [i for i, a in enumerate(attentions) if a.window is None]
    every = full[0] + 1 if full else len(attentions) + 1
    if every != len(ARCHITECTURES[arch].pattern):
      out["attention.sliding_window_pattern"] = every
  return out


def _expert_keys(kinds: Sequence[Block], architecture: str) -> dict[str, int]:
  """Returns the keys of layers' experts, without the architecture's name.

  Raises:
    UserError: some layers have experts, and others none.
  """
  dense = [i for i, kind in enumerate(kinds) if not isinstance(kind.mlp, Moe)]
  if len(dense) == len(kinds):
    return {}
  if dense:
    raise UserError(
      f"GGUF: layer {dense[0]} has no experts, and others have; expected them "
      f"in every layer of a {architecture!r}. Keep the model as --format=hf"
    )
  routing = kinds[0].mlp.routing
  out = {
    "expert_count": routing.experts,
    "expert_used_count": routing.active,
  }
  if ARCHITECTURES[architecture].expert_size:
    out["expert_feed_forward_length"] = kinds[0].mlp.hidden
  return out


def folded_scale(model: Transformer, arch: str) -> float:
  """Returns what the queries take of a scale that no key can hold."""
  kinds = model.layer_kinds()
  a, usual = kinds[0].attention, kinds[0].attention.head_dim ** -0.5
  scale = usual if a.scale is None else a.scale
  if len(kinds) in ARCHITECTURES[arch].scaled_by_width:
    usual = (model.width / a.heads) ** -0.5
  fold = scale / usual
  return 1.0 if math.isclose(fold, 1.0, rel_tol=1e-12) else fold


def check_described(model: Transformer, file: GGUF) -> None:
  """Raises UserError unless the file, read back, is `model`."""
  family, sizes, _ = sizes_from_metadata("GGUF", file)
  again = presets.transformer(family, sizes, model.dtype)

  def plain(m: Transformer):
    # Both scales are compared as one number, the weights' share included.
    return [
      k.clone(attention=gguf_rope.without_llama3(k.attention.clone(scale=None)))
      for k in m.layer_kinds()
    ]

  same = plain(again) == plain(model) and gguf_rope.same_frequencies(
    again, model
  )
  for field in ("vocab_size", "width", "norm", "tied", "softcap"):
    same = same and getattr(again, field) == getattr(model, field)
  same = same and math.isclose(again.embed_scale, model.embed_scale)
  scales = {k.attention.scale for k in model.layer_kinds()}
  if not same or len(scales) > 1:
    raise UserError(
      "GGUF: architecture "
      f"{file.metadata['general.architecture']!r} cannot describe this model: "
      "reading it back gives another one.\nKeep it as --format=hf."
    )
