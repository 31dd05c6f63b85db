"""Hugging Face directories: config.json and safetensors to a model of ours.

What must be in the file follows from the model: every parameter has one name
(`names`), and a tensor that is missing, superfluous or of another shape is an
error. Three kinds of tensor are tolerated: a copy of a tied head, which must
equal the embedding, the rotary tables of old files (`names.BUFFERS`), and keys
of layers that borrow others' (`names.unused`).
"""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from research import tree
from research.interop import parts, quantized
from research.interop.hf import config as hf_config
from research.interop.hf import experts as hf_experts
from research.interop.hf import llada, llada2
from research.interop.hf import names as hf_names
from research.interop.hf.names import EMBEDDING, HEAD
from research.interop.parts import DTYPES, PLAIN, Address, Slot, slots
from research.io import safetensors, unread
from research.nn import presets
from research.nn.transformer import Transformer
from research.typing import UserError

_SHOWN = 10

# Text models inside multimodal files, by both of transformers' spellings; the
# other parts of such a file are left out.
_TEXT_PARTS = (
  (re.compile(r"(model\.)?language_model\.lm_head\."), "lm_head."),
  (re.compile(r"(model\.)?language_model\.(model\.)?"), "model."),
)
_OTHER_PARTS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def language_model(
  tensors: Mapping[str, quantized.Tensor],
) -> dict[str, quantized.Tensor]:
  """Returns a multimodal file's language model under its usual names."""
  out = {}
  for name, tensor in tensors.items():
    if _OTHER_PARTS.match(name):
      continue
    for pattern, plain in _TEXT_PARTS:
      if pattern.match(name):
        name = pattern.sub(plain, name, count=1)
        break
    out[name] = tensor
  return out


def mismatch(
  where: Any,
  missing: Sequence[str],
  extra: Sequence[str],
  expected: str = "the configuration",
) -> UserError:
  """Returns the error that names what is missing and what is superfluous."""

  def shown(word, items):
    some = ", ".join(sorted(items)[:_SHOWN])
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{len(items)} {word}: {some}{more}" if items else ""

  lines = [shown("missing", missing), shown("superfluous", extra)]
  head = f"{where}: the tensors do not match {expected}"
  return UserError("\n".join([head, *(line for line in lines if line)]))


def _check(where, model, tensors, wanted) -> None:
  missing = [name for name in wanted if name not in tensors]
  known = {*wanted, *hf_names.unused(model)}
  extra = [
    n for n in tensors if n not in known and not hf_names.BUFFERS.match(n)
  ]
  if model.tied and HEAD in extra and EMBEDDING in tensors:
    extra.remove(HEAD)
    _check_tied(tensors[EMBEDDING], tensors[HEAD])
  if missing or extra:
    raise mismatch(where, missing, extra)
  for name, shape in wanted.items():
    tensor = tensors[name]
    if tensor.shape != shape:
      raise UserError(
        f"{tensor.file}: {name} has shape {list(tensor.shape)}, "
        f"expected {list(shape)} by config.json"
      )
    if str(tensor.dtype) not in PLAIN:
      raise UserError(
        f"{tensor.file}: {name} is stored as {tensor.dtype}, expected one of "
        f"{', '.join(PLAIN)}"
      )


def _check_tied(embedding, head, rows: int = 4096) -> None:
  same = embedding.shape == head.shape and embedding.dtype == head.dtype
  for i in range(0, embedding.shape[0] if same else 0, rows):
    part = slice(i, i + rows)
    same = same and np.array_equal(
      embedding.read(part).view(np.uint8), head.read(part).view(np.uint8)
    )
  if not same:
    raise UserError(
      f"{head.file}: {HEAD} differs from {EMBEDDING}, but config.json says "
      "tie_word_embeddings; set it to false to keep both"
    )


def read_params(
  model: Transformer,
  tensors: Mapping[str, quantized.Tensor],
  dtype: str | None = "float32",
  where: Any = "model",
  shardings: unread.Shardings | None = None,
  packed: bool = False,
) -> dict[str, Any]:
  """Returns `model`'s parameters out of Hugging Face tensors.

  Each array is filled layer by layer, so beside the result only one array is
  ever held twice; with shardings, each device's part of it is.

  Args:
    dtype: of the result; wider values are rounded to nearest even. None for
      the stored one, or float32 where layers differ or have float64.
    packed: whether packed matrices stay as they are, or are decoded.

  Raises:
    UserError: the tensors are not exactly the model's.
  """
  described = unread_params(model, tensors, dtype, where, packed)
  return unread.place(described, shardings)


def unread_params(
  model: Transformer,
  tensors: Mapping[str, quantized.Tensor],
  dtype: str | None = "float32",
  where: Any = "model",
  packed: bool = False,
) -> dict[str, Any]:
  """Returns `model`'s parameter tree as `read_params` does, unread."""
  rows, places = hf_names.table(model), slots(model)
  _check(where, model, tensors, _wanted(rows, places))
  if packed and any(map(_is_packed, tensors.values())):
    return _packed_params(model, rows, places, tensors, dtype)
  filled = {}
  for slot in places:
    kind = jnp.dtype(dtype or _stored(rows, slot, tensors))
    fills = [
      filler(tensors[name], transposed)
      for name, transposed in map(rows.theirs, slot.addresses)
    ]
    filled[slot.path] = unread.stacked(fills, slot.lead, slot.one, kind)
  return unread.nested(filled)


def _is_packed(tensor: quantized.Tensor) -> bool:
  return isinstance(tensor, quantized.PackedTensor)


def _packed_params(model, rows, places, tensors, dtype) -> dict[str, Any]:
  def leaf(slot: Slot, address: Address) -> Any:
    name, transposed = rows.theirs(address)
    tensor = tensors[name]
    if _is_packed(tensor):
      if not transposed:
        raise UserError(
          f"{tensor.file}: {name} is packed, which is supported of linear "
          "layers; load the model without packed"
        )
      return tensor.leaf
    kind = jnp.dtype(dtype or str(tensor.dtype))
    fill = filler(tensor, transposed)
    return unread.stacked([fill], (), slot.one, kind)

  kinds = model.layer_kinds()
  outside: dict[str, Any] = {}
  layers: list[dict[str, Any]] = [{} for _ in kinds]
  for slot in places:
    of: dict[int | None, list[Any]] = {}
    for address in slot.addresses:
      of.setdefault(address.layer, []).append(leaf(slot, address))
    first = slot.addresses[0]
    for layer, leaves in of.items():
      into = outside if layer is None else layers[layer]
      into[first.path] = (
        leaves[0]
        if first.expert is None
        else quantized.stack_weights(leaves, slot.path)
      )
  return tree.stack(
    unread.nested(outside),
    [unread.nested(x) for x in layers],
    kinds,
    quantized.stack,
  )


def _wanted(rows: hf_names.Table, places: Sequence[Slot]) -> dict[str, tuple]:
  wanted = {}
  for slot in places:
    for name, transposed in map(rows.theirs, slot.addresses):
      wanted[name] = slot.one[::-1] if transposed else slot.one
  return wanted


def _reader(tensor: quantized.Tensor, transposed: bool):
  """Returns what reads a part of a parameter, in our orientation."""

  def read(index: Any = ...) -> np.ndarray:
    if not transposed:
      return tensor.read(index)
    # Cut before it is turned, so that only this part of the file is read.
    return tensor.read(index if index is ... else index[::-1]).T

  return read


def filler(tensor: quantized.Tensor, transposed: bool) -> unread.Fill:
  """Returns what reads a tensor of a file in pieces, transposed if asked to."""
  read, shape = _reader(tensor, transposed), tensor.shape
  if _is_packed(tensor) or not shape:  # decoded as a whole, once
    return unread.in_pieces(read)
  axis = len(shape) - 1 if transposed else 0
  row = tensor.dtype.itemsize * math.prod(shape[1:])
  return unread.in_pieces(read, axis, row)


def _stored(rows, slot, tensors) -> str:
  kinds = {str(tensors[rows.theirs(a)[0]].dtype) for a in slot.addresses}
  return kinds.pop() if len(kinds) == 1 and kinds <= {*DTYPES} else "float32"


def read_parts(
  model: Transformer,
  tensors: Mapping[str, quantized.Tensor],
  where: Any = "model",
) -> dict[Address, parts.Part]:
  """Returns `model`'s parameters one by one, unread, as they are stored.

  Raises:
    UserError: the tensors are not exactly the model's.
  """
  rows, places, out = hf_names.table(model), slots(model), {}
  _check(where, model, tensors, _wanted(rows, places))
  for slot in places:
    for address in slot.addresses:
      name, transposed = rows.theirs(address)
      tensor = tensors[name]
      kind, reader = str(tensor.dtype), _reader(tensor, transposed)
      if _is_packed(tensor) and transposed:
        kind, reader = parts.kind_of(tensor.leaf), tensor.weight
      out[address] = parts.Part(slot.one, kind, reader)
  return out


def open_model(
  directory: str | pathlib.Path,
  dtype: str = "float32",
  config: Mapping[str, Any] | None = None,
) -> tuple[Transformer, dict[str, quantized.Tensor], dict[str, Any]]:
  """Returns (model, its tensors unread, source) of a directory.

  Raises:
    UserError: anything in it is missing, damaged or not supported.
  """
  directory = pathlib.Path(directory)
  file = directory / "config.json"
  config = safetensors.read_json(file) if config is None else config
  config, quantization = quantized.split_config(config, directory)
  family, sizes = hf_config.sizes_from_config(config, str(file))
  model = presets.transformer(family, sizes, dtype)
  tensors: dict[str, Any] = safetensors.open_directory(directory)
  if quantization is not None:
    tensors, quantization = quantized.open_tensors(
      quantization, tensors, directory
    )
  if config["model_type"] == "gemma3":
    tensors = language_model(tensors)
  if config["model_type"] == llada.KIND:
    tensors = llada.to_llama_names(tensors)
  if config["model_type"] == llada2.KIND:
    tensors = llada2.to_qwen3_moe_names(tensors, sizes.heads, sizes.kv_heads)
  tensors = hf_experts.unstack(model, hf_names.table(model), tensors)
  if quantization is not None:
    known = _wanted(hf_names.table(model), slots(model))
    tensors = quantized.without_zero_biases(tensors, known)
  source: dict[str, Any] = dict(
    format="hf",
    path=str(directory),
    model_type=hf_config.text_fields(config, str(file)).values["model_type"],
    config=config,
  )
  if quantization is not None:
    source["quantization"] = dict(quantization)
  return model, tensors, source


def model_from_directory(
  directory: str | pathlib.Path,
  dtype: str = "float32",
  shardings: unread.Shardings | None = None,
  packed: bool = True,
  config: Mapping[str, Any] | None = None,
) -> tuple[Transformer, dict[str, Any], dict[str, Any]]:
  """Returns (model, params, source) of a Hugging Face directory.

  Args:
    dtype: of the parameters and of the computation.
    packed: whether matrices that a tool has quantized stay packed.

  Raises:
    UserError: anything in it is missing, damaged or not supported.
  """
  model, tensors, source = open_model(directory, dtype, config)
  params = read_params(model, tensors, dtype, directory, shardings, packed)
  return model, params, source
