"""Writes adapters as PEFT's own directories.

Only fields and patterns that mean the same after PEFT has sorted them are
written (research/lora/MATH.md 7.1 to 7.3).
"""

import dataclasses
import json
import pathlib
import warnings
from collections.abc import Collection, Mapping

import numpy as np

from research import weights
from research.interop import parts
from research.interop.parts import Address
from research.interop.peft import base_fingerprint, full_weights
from research.interop.peft import config as peft_config
from research.interop.peft import experts as peft_experts
from research.interop.peft import names as peft_names
from research.interop.peft.names import PREFIX, USUAL, Naming
from research.interop.peft.read import WEIGHTS
from research.io import safetensors
from research.lora import lora_factors, wrap
from research.lora.adapted import AdaptedTensor
from research.lora.method import Method
from research.lora.methods.lora import LoRA
from research.lora.methods.tokens import Tokens
from research.nn.transformer import Transformer
from research.typing import Params, UserError, WriteError

Adapters = Mapping[str, AdaptedTensor]
"""Adapters without their bases, by address."""


def save_adapter(
  directory: str | pathlib.Path,
  params: Params,
  model: Transformer,
  base_name: str,
  use_rslora: bool | None = None,
  whole: Collection[str] = (),
  resized: bool = False,
  naming: Naming = USUAL,
  base: Params | None = None,
) -> None:
  """Writes the adapters in `params` as PEFT would have.

  Of adapters over a rotated or scaled base those are written that make the same
  of `base`, see `over_base`.

  Dropout of all adapters is written as 0 where some are on stacked experts,
  and warned of: PEFT has none there.

  Args:
    params: with AdaptedTensor leaves; one adapter a weight.
    base_name: base_model_name_or_path: a name, or a directory, absolute or
      relative to `directory`.
    use_rslora: whether to state the scales of plain LoRA as `alpha / sqrt(r)`
      rather than `alpha / r`; None for as they are.
    whole: addresses of weights without adapter that differ from the base's.
    resized: whether the base has another number of tokens; both embeddings
      are written then, and whoever loads the adapter resizes the base first.
    naming: what the base calls its modules.
      were trained over these, packed or not; None for no check.

  Raises:
    UserError: there are no adapters, PEFT has no way to say what they do, or
      they were trained over other weights than `base`.
  """
  directory = pathlib.Path(directory)
  if base is not None:
    params, whole = over_base(directory, params, model, base_name, base, whole)
  modules = peft_names.modules(params, model, naming)
  found = wrap.adapters(params, _thin)
  stacked = {} if naming != USUAL else wrap.experts(params)
  stacked = {path: found.pop(path) for path in stacked if path in found}
  every = found | stacked
  _check(every, {*modules, *stacked}, directory)
  peft_names.check_not_fused([modules[path] for path in found], directory)
  sizes = wrap.matrices(params)
  beside = not all(isinstance(w.method, Tokens) for w in every.values())
  tensors, methods, rows = _exported(
    directory, found, modules, sizes, use_rslora, beside
  )
  more, parameters, names = peft_experts.to_tensors(directory, stacked, params)
  tensors |= more
  parameters = {k: _stated(m, use_rslora) for k, m in parameters.items()}
  if parameters:
    _warn_of_dropout(directory, every)
    methods = {m: _undropped(method) for m, method in methods.items()}
  if model.tied:
    tensors |= _head(directory, tensors, found, resized, naming, beside)
  sides = {naming.embedding, naming.head} if model.tied and rows else set(rows)
  kept, replaced, saved, bias = _full_weights(
    params, model, set(methods), set(whole), resized, naming, sides
  )
  embedding = "embed" in found or ("embed" in whole and not resized)
  config = peft_config.make_config(
    methods,
    list(modules.values()),
    base_name,
    saved,
    bias,
    # One matrix on both sides: ensure_weight_tying says so.
    model.tied and not _in_rows(found) and embedding,
    rows,
    (parameters, names),
    full_names=bool(naming.language),
  )
  notes = {"format": "pt"} | base_fingerprint.header(params, replaced)
  _write(directory, tensors | kept, notes, config)


def _warn_of_dropout(directory, every: Adapters) -> None:
  """Warns if dropout is lost, which PEFT refuses beside stacked experts."""
  lost = {p: w.method.dropout for p, w in every.items() if w.method.dropout}
  if lost:
    path = next(iter(lost))
    warnings.warn(
      f"{directory}: dropout of {lost[path]} on {path} is written as 0 (in"
      f" all, of {len(lost)} adapters): PEFT supports no dropout with"
      " adapters on stacked experts.\nOutputs do not change; set it again to"
      " train further.",
      RuntimeWarning,
      stacklevel=3,
    )


def _undropped(method: Method) -> Method:
  return dataclasses.replace(method, dropout=0.0)


def _check(found: Adapters, named: Collection[str], directory) -> None:
  """Raises UserError where there is nothing to save, or no name for it."""
  if not found:
    raise UserError(f"{directory}: these parameters hold no adapter to save")
  nameless = sorted(set(found) - set(named))
  if nameless:
    raise UserError(
      f"{directory}: PEFT's files have no name for an adapter on what only "
      f"our files have, or on such experts ({nameless[0]}).\n"
      "Merge it into the model instead."
    )


def over_base(
  where: pathlib.Path,
  params: Params,
  model: Transformer,
  base_name: str,
  base: Params,
  whole: Collection[str],
) -> tuple[Params, Collection[str]]:
  """Returns `params` and `whole` in the coordinates of a base.

  They are unchanged if the adapters were trained over `base` as it is, packed
  or not.

  Raises:
    UserError: they were trained over other weights, or over `base` rotated or
      scaled in a way that cannot be undone.
  """
  both = sorted(set(wrap.adapters(params, _thin)) & set(whole))
  notes = base_fingerprint.header(params, whole)
  other = (
    both[0] if both else base_fingerprint.other_numbers(where, notes, base)
  )
  if other is None:
    return params, whole
  try:
    return lora_factors.over_original(model, params, base), ()
  except UserError as error:
    raise UserError(
      f"{where}: the adapter was trained over weights that are not those of"
      f" {base_name}: {other} differs, as after Rotate, SpinQuant, SmoothQuant"
      " or AWQ, and other programs would add it to the weights of"
      f" {base_name}.\nIt cannot be written for these: {error}.\nMerge it"
      " instead (--format=hf), or keep it over its own base (--format=orbax)."
    ) from error


def _exported(directory, found: Adapters, modules, sizes, use_rslora, beside):
  """Returns what PEFT's files say of adapters.

  Tensors by their names, and by module the methods and the tokens with rows:
  these are a field's if they are `beside` another method, else a method.
  """
  tensors, methods, rows, shared = {}, {}, {}, {}
  for path, w in found.items():
    module = modules[path]
    method, arrays = w.method.exported(w.arrays)
    if method.PEFT is None:
      raise UserError(
        f"{directory}: PEFT has no method {type(method).__name__}; merge it "
        "into the model, or convert it to plain LoRA first"
      )
    method = method.for_module(module, [modules[p] for p in found])
    if isinstance(method, Tokens):
      method = dataclasses.replace(method, beside=beside)
    arrays = {k: np.asarray(x, np.float32) for k, x in arrays.items()}
    for key, x in peft_names.to_tensors(
      module, method, arrays, sizes[path]
    ).items():
      tensors[key] = _joined(tensors[key], x) if key in tensors else x
    for name, least in method.shared_shapes().items():
      shared[peft_names.key(module, name, method)] = least
    if isinstance(method, Tokens) and beside:
      rows[module] = method.ids
    else:
      methods[module] = _stated(method, use_rslora)
  tensors |= {key: _padded(tensors[key], n) for key, n in shared.items()}
  return tensors, methods, rows


def _in_rows(found: Adapters) -> bool:
  """Returns whether it is single rows of the embedding that are adapted."""
  return "embed" in found and isinstance(found["embed"].method, Tokens)


def _head(
  directory, tensors, found: Adapters, resized, naming, beside
) -> dict[str, np.ndarray]:
  """Returns a tied head's tensors, the embedding's as PEFT repeats them.

  Raises:
    UserError: the embedding has an adapter that PEFT does not tie.
  """
  if "embed" not in found:
    return {}
  if not _in_rows(found):
    method, _ = found["embed"].method.exported(found["embed"].arrays)
    if type(method) is not LoRA:
      raise UserError(
        f"{directory}: embed has an adapter of {type(method).__name__} and is"
        " the head as well, of which PEFT ties plain LoRA alone: DoRA's head"
        " has other magnitudes there.\nMerge it into the model instead."
      )
    turned = peft_names.tied_keys(naming)
    return {copy: tensors[key].T for copy, key in turned}
  if not resized and beside:
    return {}
  same = peft_names.tied_rows(naming)
  return {copy: tensors[key] for copy, key in same if key in tensors}


def _write(directory: pathlib.Path, tensors, notes, config) -> None:
  try:
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.write_file(directory / WEIGHTS, tensors, notes)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / peft_config.CONFIG).write_text(text)
  except OSError as e:
    raise WriteError(f"{directory}: cannot be written ({e.strerror})") from e


def _full_weights(params, model, adapted, changed, resized, naming, rows):
  """Returns what is no adapter.

  Tensors, the addresses that they are of, modules_to_save, and the bias mode.
  """
  base = full_weights.base_weights(params, model, naming)
  biases = {a for a, w in base.items() if w.name == "bias"}
  theirs = {a for a in biases if base[a].module in adapted}
  changed = changed - ({"embed", "head"} if resized else set())
  bias = "none"
  if changed & biases:
    bias = "lora_only" if changed & biases <= theirs else "all"
  saved = sorted({base[a].module for a in changed - biases})
  keys = full_weights.required(base, adapted, saved, bias)
  if resized:
    keys |= full_weights.embeddings(
      base, model.tied, keys, adapted, naming, rows
    )
  elif model.tied and "embed" in changed:
    copy = dataclasses.replace(base["embed"], module=naming.head)
    keys[f"{PREFIX}{naming.head}.weight"] = copy
  read = parts.from_params(wrap.disable(params))
  out = {}
  for key, w in keys.items():
    x = np.asarray(weights.dense(read[Address.parse(w.address)].read()))
    out[key] = x.T if w.transposed else x
  return out, {w.address for w in keys.values()}, saved, bias


def _joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Returns the array whose first rows and columns two modules have."""
  shape = tuple(map(max, one.shape, other.shape))
  out = np.zeros(shape, one.dtype)
  for x in (one, other):
    out[tuple(slice(n) for n in x.shape)] = x
  for x in (one, other):
    if not np.array_equal(out[tuple(slice(n) for n in x.shape)], x):
      raise UserError(
        "modules of this adapter should share an array and have different "
        "ones; adapters that were initialised separately cannot be saved as one"
      )
  return out


def _padded(x: np.ndarray, least: tuple[int, ...]) -> np.ndarray:
  rest = map(max, np.subtract(least, x.shape), (0,) * x.ndim)
  return np.pad(x, [(0, n) for n in rest])


def _stated(method: Method, use_rslora: bool | None) -> Method:
  """Returns the same method with its scale over `r` or over `sqrt(r)`."""
  if use_rslora is None or not isinstance(method, LoRA):
    return method
  alpha = method.scale * (method.rank**0.5 if use_rslora else method.rank)
  return dataclasses.replace(method, alpha=alpha, rslora=use_rslora)


def _thin(w: AdaptedTensor) -> AdaptedTensor:
  if isinstance(w.w, AdaptedTensor):
    raise UserError("two adapters on one weight: merge one before saving")
  return dataclasses.replace(w, w=None, key=None)
