"""PEFT's adapters on disk: adapter_config.json and adapter_model.safetensors.

Reading is strict where PEFT is not: a module that the configuration matches
and the file lacks, or the other way round, or an adapter that changes nothing
is an error, and so is every feature that is not understood here (lora.md
sections 6.4 to 6.6). Writing uses only fields and patterns that mean the same
after PEFT has sorted them.
"""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from research import tree, weights
from research.interop import hf, names, safetensors
from research.lora import adapt, peft_config
from research.lora.tensor import LoRATensor
from research.nn.transformer import Transformer
from research.typing import Params, UserError

WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."


def _keys(module: str) -> tuple[str, str]:
  """Returns the names in the file of a module's A `[r, in]` and B."""
  if module == "model.embed_tokens":
    stem = f"{_PREFIX}{module}.lora_embedding_"
    return f"{stem}A", f"{stem}B"
  return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _modules(params: Params, model: Transformer) -> dict[str, str]:
  """Returns Hugging Face's module name of each address of a matrix."""
  rows, out = hf.table(model), {}
  for path in adapt.matrices(params):
    layer, inner = None, path
    if path.startswith("layers/"):
      _, index, inner = path.split("/", 2)
      layer = int(index)
    # An adapted weight that is adapted again is addressed as itself.
    name, _ = rows.theirs(names.Address(layer, inner))
    out[path] = name.removesuffix(".weight")
  return out


def load_adapter(
  directory: str | pathlib.Path, params: Params, model: Transformer
) -> dict[str, Any]:
  """Returns `params` with PEFT's adapter around its weights, in fp32.

  Args:
    directory: holds adapter_config.json and adapter_model.safetensors.
    params: the base's, packed or not.
    model: the base.

  Raises:
    UserError: the adapter is damaged, does not fit, has a feature that is not
      supported, or would change nothing.
  """
  directory = pathlib.Path(directory)
  fields = peft_config.read_config(directory)
  if not (directory / WEIGHTS).is_file():
    pickled = (directory / "adapter_model.bin").exists()
    hint = (
      "; adapter_model.bin is a pickle, which can run code" if pickled else ""
    )
    raise UserError(
      f"{directory}: no {WEIGHTS}{hint}.\n"
      "Save it with PEFT's save_pretrained(..., safe_serialization=True)."
    )
  modules = _modules(params, model)
  specs = peft_config.read_specs(fields, modules)
  if model.tied and "embed" in specs:
    raise fields.wrong(
      "target_modules",
      "no embed_tokens: PEFT adapts only the input side of a tied embedding",
    )
  tensors = safetensors.open_file(directory / WEIGHTS)
  _check(directory / WEIGHTS, tensors, specs, modules, params, model)

  def factors(paths, spec, shape):
    pairs = [_keys(modules[p]) for p in paths]
    a = np.stack([tensors[k].read() for k, _ in pairs])
    b = np.stack([tensors[k].read().T for _, k in pairs])
    return jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)

  return adapt.wrap(params, specs, factors)


def _check(path, tensors, specs, modules, params, model) -> None:
  """Raises UserError unless the file holds exactly what `specs` ask for."""
  shapes, wanted = adapt.matrices(params), {}
  for address, spec in specs.items():
    a, b = _keys(modules[address])
    wanted[a] = (spec.rank, shapes[address][0])
    wanted[b] = (shapes[address][1], spec.rank)
  extra = set(tensors) - set(wanted)
  for key in sorted(extra & set(_copies(params, model))):
    _check_copy(path, key, tensors[key], _copies(params, model)[key])
    extra.remove(key)
  missing = set(wanted) - set(tensors)
  if missing or extra:
    raise hf.difference(path, sorted(missing), sorted(extra))
  for key, shape in wanted.items():
    if tensors[key].shape != shape:
      raise UserError(
        f"{path}: {key} has shape {list(tensors[key].shape)}, expected "
        f"{list(shape)} by {peft_config.CONFIG} and the base model"
      )
    if str(tensors[key].dtype) not in hf.DTYPES:
      raise UserError(
        f"{path}: {key} is stored as {tensors[key].dtype}, expected one of "
        f"{', '.join(hf.DTYPES)}"
      )
  pairs = (_keys(modules[address]) for address in specs)
  if not any(all(tensors[k].read().any() for k in pair) for pair in pairs):
    raise UserError(
      f"{path}: B (or A) is zero in every module, so the adapter changes "
      "nothing: it was saved before any training step"
    )


def _copies(params: Params, model: Transformer) -> dict[str, Any]:
  """Returns the base's weights that PEFT may store again, by key."""
  out = {}
  for module, ours in (("model.embed_tokens", "embed"), ("lm_head", "head")):
    if ours in params:
      out[f"{_PREFIX}{module}.weight"] = ours, params[ours]
      out[f"{_PREFIX}{module}.base_layer.weight"] = ours, params[ours]
  return out


def _check_copy(path, key, tensor, ours_and_weight) -> None:
  ours, weight = ours_and_weight
  base = np.asarray(weights.dense(weight))
  base = base.T if ours == "head" else base
  if tensor.shape != base.shape or not np.array_equal(
    tensor.read().astype(base.dtype), base
  ):
    raise UserError(
      f"{path}: {key} differs from the base model's; an adapter that brings "
      "its own embeddings is not supported"
    )


def save_adapter(
  directory: str | pathlib.Path,
  params: Params,
  model: Transformer,
  base_name: str,
  use_rslora: bool = False,
) -> None:
  """Writes the adapters in `params` as PEFT would have.

  Args:
    directory: made if need be.
    params: with LoRATensor leaves; one adapter a weight.
    model: the base.
    base_name: base_model_name_or_path: a name, or a directory, absolute or
      relative to `directory`.
    use_rslora: state the scales as `alpha / sqrt(r)` instead of `alpha / r`.

  Raises:
    UserError: there are no adapters, or PEFT has no way to say what they do.
  """
  directory = pathlib.Path(directory)
  modules = _modules(params, model)
  found = _adapters(params)
  if not found:
    raise UserError(f"{directory}: these parameters hold no adapter to save")
  if model.tied and "embed" in found:
    raise UserError(
      f"{directory}: PEFT adapts only the input side of a tied embedding; "
      "this adapter changes both, so merge it or leave out embed"
    )
  tensors, forms = {}, {}
  for path, w in found.items():
    key_a, key_b = _keys(modules[path])
    tensors[key_a] = np.asarray(w.a, np.float32)
    tensors[key_b] = np.asarray(w.b, np.float32).T
    rank = w.a.shape[-2]
    alpha = w.scale * (rank**0.5 if use_rslora else rank)
    forms[modules[path]] = (rank, float(f"{alpha:.12g}"), w.dropout)
  config = peft_config.make_config(
    forms, list(modules.values()), base_name, use_rslora
  )
  try:
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.write_file(directory / WEIGHTS, tensors)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / peft_config.CONFIG).write_text(text)
  except OSError as e:
    raise UserError(f"{directory}: cannot be written ({e.strerror})") from e


def _adapters(params: Params) -> dict[str, LoRATensor]:
  """Returns each layer's adapter without its base, by address."""
  out = {}

  def thin(w, k=None):
    if isinstance(w.w, LoRATensor):
      raise UserError("two adapters on one weight: merge one before saving")
    a, b = (w.a, w.b) if k is None else (w.a[k], w.b[k])
    return LoRATensor(None, a, b, scale=w.scale, dropout=w.dropout)

  for path, leaf in adapt.leaves(tree.top(params)):
    if isinstance(leaf, LoRATensor):
      out[path] = thin(leaf)
  for prefix, layers in tree.layer_indices(params).items():
    run, layer = prefix.split("/")
    for path, leaf in adapt.leaves(params[run][layer]):
      if isinstance(leaf, LoRATensor):
        for k, i in enumerate(layers):
          out[f"layers/{i}/{path}"] = thin(leaf, k)
  return out
