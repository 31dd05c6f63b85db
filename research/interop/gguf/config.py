"""GGUF metadata as a family and sizes; every key is used or refused."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from research.interop.gguf import GGUF, gguf_experts
from research.interop.gguf import rope as gguf_rope
from research.nn import presets
from research.nn.rope import Linear, Scaling, Yarn
from research.typing import UserError


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What a `general.architecture` says without saying it.

  Attributes:
    family: in `presets.FAMILIES`.
    interleaved: whether the converter reordered query and key rows.
    local_theta: of windowed layers, where llama.cpp hard-codes it.
    scaled_by_width: depths whose logits are scaled by `(D/N)^-0.5` (27B).
  """

  family: str
  interleaved: bool = False
  local_theta: float | None = None
  scaled_by_width: tuple[int, ...] = ()


ARCHITECTURES = {
  "llama": Architecture("llama", interleaved=True),
  "qwen2": Architecture("qwen2"),
  "qwen3": Architecture("qwen3"),
  "qwen3moe": Architecture("qwen3_moe"),
  "gemma": Architecture("gemma"),
  "gemma2": Architecture("gemma2", scaled_by_width=(46,)),
  "gemma3": Architecture("gemma3", local_theta=1e4, scaled_by_width=(62,)),
}
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


def config(path: str, file: GGUF) -> tuple[presets.Family, presets.Sizes, bool]:
  """Returns family, sizes, and whether query and key rows are interleaved.

  Args:
    path: the file's name, for messages.
    file: an open file.

  Raises:
    UserError: unknown architecture, a missing, malformed or unknown key.
  """
  name = file.metadata.get("general.architecture")
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
  window = keys.integer("attention.sliding_window")
  rotated = keys.integer("rope.dimension_count", head_dim)
  if rotated != head_dim:
    keys.fail("rope.dimension_count", rotated, f"the head's {head_dim}")
  hidden = keys.needed("feed_forward_length")
  sparse = gguf_experts.read(keys, name, hidden)
  base = kind.family
  if name == "llama" and (window or sparse):
    base = "mixtral" if sparse else "mistral"
  family = dataclasses.replace(
    presets.FAMILIES[base],
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
    attention_softcap=keys.real("attn_logit_softcapping"),
    logit_softcap=keys.real("final_logit_softcapping"),
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


def pattern_of(architecture: str) -> tuple[str, ...]:
  """Returns the kinds of layers where a file does not say."""
  return presets.FAMILIES[ARCHITECTURES[architecture].family].pattern


def _pattern(
  keys: _Keys, family: presets.Family, depth: int
) -> tuple[str, ...] | None:
  """Returns the kinds of layers where the file says which are global."""
  every = keys.integer("attention.sliding_window_pattern")
  if every is None or "local" not in family.pattern:
    return None
  if every > depth:  # no layer is global
    return ("local",)
  return ("local",) * (every - 1) + ("global",)


def _scaling(keys: _Keys, file: GGUF, theta: float, dim: int) -> Scaling | None:
  """Returns the rotation's extension, by keys or by its factors."""
  kind = keys.text("rope.scaling.type", "none")
  factor = keys.real("rope.scaling.factor")
  original = keys.integer("rope.scaling.original_context_length")
  factors = file.tensors.get("rope_freqs.weight")
  if factors is not None:
    found = factors.decode().reshape(-1)
    return gguf_rope.llama3(keys.path, found, theta, dim, original)
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
