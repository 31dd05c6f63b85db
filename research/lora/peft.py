"""PEFT's adapters on disk: adapter_config.json and adapter_model.safetensors.

Reading is strict where PEFT is not: a module that the configuration matches
and the file lacks, or the other way round, or an adapter that changes nothing
is an error, and so is every feature that is not understood here (lora.md
sections 6.4 to 6.6). Writing uses only fields and patterns that mean the same
after PEFT has sorted them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import tree, weights
from research.interop import hf, parts, safetensors
from research.lora import peft_config, peft_whole, wrap
from research.lora.adapted import AdaptedTensor
from research.lora.method import Method, Place
from research.lora.methods.lora import KEYS, LoRA
from research.nn.transformer import Transformer
from research.typing import Params, UserError

WEIGHTS = "adapter_model.safetensors"

_PREFIX = peft_whole.PREFIX


def _named(
  module: str, method: Method, arrays: Any, size: tuple[int, int]
) -> dict[str, Any]:
  """Returns a module's tensors by their names in the file."""
  place = Place(*size, embedding=module == peft_whole.EMBEDDING)
  return {
    _key(module, name, method): x
    for name, x in method.to_peft(arrays, place).items()
  }


def _key(module: str, name: str, method: Method) -> str:
  """Returns the name in the file of one tensor of a module."""
  if name in method.PEFT_SHARED:
    return f"base_model.{name}"
  return f"{_PREFIX}{module}.{name}"


def _shapes_of(
  module: str, method: Method, size: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of a module's tensors by their names in the file."""
  place = Place(*size, embedding=module == peft_whole.EMBEDDING)

  def fresh():
    w = jnp.zeros(size)
    trained, fixed = method.start(jax.random.key(0), place, w)
    return _named(module, method, trained | fixed, size)

  return {key: x.shape for key, x in jax.eval_shape(fresh).items()}


def _modules(params: Params, model: Transformer) -> dict[str, str]:
  """Returns Hugging Face's module name of each address of a matrix."""
  rows, out = hf.table(model), {}
  for path in wrap.matrices(params):
    # An adapted weight that is adapted again is addressed as itself.
    name, _ = rows.theirs(peft_whole.addressed(path))
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
      supported, would change nothing, or makes another model of the base
      (`open_adapter` returns that, too).
  """
  adapted, again = open_adapter(directory, params, model)
  if again != model:
    raise UserError(
      f"{directory}: this adapter brings embeddings that make another model "
      "of its base; load it as the model itself: --model=" + str(directory)
    )
  return adapted


def open_adapter(
  directory: str | pathlib.Path, params: Params, model: Transformer
) -> tuple[dict[str, Any], Transformer]:
  """Returns (params, model) with PEFT's adapter; see `load_adapter`.

  The model is another one where the adapter brings a longer vocabulary, or
  adapts one side alone of a tied embedding.
  """
  directory = pathlib.Path(directory)
  fields, kind = peft_config.read_config(directory)
  file = directory / WEIGHTS
  if not file.is_file():
    pickled = (directory / "adapter_model.bin").exists()
    hint = (
      "; adapter_model.bin is a pickle, which can run code" if pickled else ""
    )
    raise UserError(
      f"{directory}: no {WEIGHTS}{hint}.\n"
      "Save it with PEFT's save_pretrained(..., safe_serialization=True)."
    )
  tensors = safetensors.open_file(file)
  params, model = _untied(fields, kind, params, model)
  modules = _modules(params, model)
  methods = peft_config.read_methods(
    fields, kind, modules, wrap.matrices(params)
  )
  base = peft_whole.base_weights(params, model)
  whole = peft_whole.required(
    base,
    {modules[address] for address in methods},
    peft_config.whole_modules(fields),
    peft_config.bias_mode(fields),
  )
  for adapted in (set(), {peft_whole.EMBEDDING, peft_whole.HEAD}):
    optional = peft_whole.embeddings(base, model.tied, whole, adapted)
    whole |= {key: w for key, w in optional.items() if key in tensors}
  params, model = _with_whole(file, tensors, whole, params, model)
  if model.tied and "embed" in methods:
    tensors = _without_copies(file, tensors)
  _check(file, tensors, methods, modules, params, whole)

  live = []

  def make(paths, method, w):
    each = [
      _read(tensors, modules[p], method, jax.tree.map(lambda x, k=k: x[k], w))
      for k, p in enumerate(paths)
    ]
    live.extend(not method.idle(x | y) for x, y in each)
    return jax.tree.map(_stacked, *each)

  adapted = wrap.wrap(params, methods, make)
  if methods and not any(live):
    raise UserError(
      f"{file}: B (or A) is zero in every module, so the adapter changes "
      "nothing: it was saved before any training step"
    )
  return adapted, model


def _stacked(*arrays):
  x = np.stack(arrays)
  return jnp.asarray(x, x.dtype if x.dtype.kind in "iu" else jnp.float32)


def _read(tensors, module, method, w):
  """Returns (trained, fixed) of one module."""
  size = tuple(w.shape)
  place = Place(*size, embedding=module == peft_whole.EMBEDDING)
  found = {
    key.removeprefix(f"{_PREFIX}{module}.").removeprefix("base_model."): key
    for key in _shapes_of(module, method, size)
  }
  found = {name: tensors[key].read() for name, key in found.items()}
  return method.from_peft(found, place, w)


def _tied_keys() -> list[tuple[str, str]]:
  """Returns pairs of keys: the head's factors are the embedding's, turned."""
  embed, head = (
    [f"{_PREFIX}{module}.{name}" for name in KEYS[embedding]]
    for module, embedding in (
      (peft_whole.EMBEDDING, True),
      (peft_whole.HEAD, False),
    )
  )
  return [(head[0], embed[1]), (head[1], embed[0])]


def _without_copies(path, tensors):
  """Returns the tensors less a tied head's adapter, which says it again."""
  out = dict(tensors)
  for copy, key in _tied_keys():
    if copy in tensors and key in tensors:
      if not np.array_equal(tensors[copy].read(), tensors[key].read().T):
        raise UserError(
          f"{path}: {copy} is not {key} transposed, although "
          "ensure_weight_tying ties them"
        )
      del out[copy]
  return out


def _untied(fields, kind, params, model):
  """Returns the base, untied where PEFT changes one of its two sides."""
  if not model.tied or fields.flag("ensure_weight_tying"):
    return params, model
  sides = {"embed": peft_whole.EMBEDDING, "head": peft_whole.HEAD}
  modules = _modules(params, model) | sides
  touched = peft_config.read_methods(fields, kind, modules)
  saved = peft_config.whole_modules(fields)
  for address, module in sides.items():
    if address in touched or peft_whole.saved_whole(module, saved):
      return peft_whole.untie(params, model)
  return params, model


def _with_whole(path, tensors, whole, params, model):
  """Returns (params, model) with what the file brings whole."""
  values: dict[str, np.ndarray] = {}
  for key, w in whole.items():
    if key not in tensors:
      continue  # reported with all others
    if str(tensors[key].dtype) not in hf.DTYPES:
      raise _wrong_dtype(path, key, tensors[key])
    x = tensors[key].read()
    x = x.T if w.transposed else x
    first = values.setdefault(w.address, x)
    if x is not first and not np.array_equal(x, first):
      raise UserError(
        f"{path}: {key} differs from the other tensor for {w.address}, "
        "although the embedding is tied; expected a copy"
      )
  vocab = model.vocab_size
  if "embed" in values:
    vocab = len(values["embed"])
  shapes = _shapes(params)
  for address, x in values.items():
    want = list(shapes[address])
    if address in ("embed", "head"):
      want[0 if address == "embed" else 1] = vocab
    if list(x.shape) != want:
      raise UserError(
        f"{path}: {address} has shape {list(x.shape)}, expected {want} by "
        "the base model"
      )
  if vocab != model.vocab_size and not model.tied and "head" not in values:
    raise UserError(
      f"{path}: an embedding of {vocab} tokens and no head; expected "
      f"{_PREFIX}lm_head.weight beside it"
    )
  params = peft_whole.replace(params, values)
  return params, model.clone(vocab_size=vocab)


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
  out = {p: tuple(w.shape) for p, w in wrap.leaves(tree.top(params))}
  for prefix, layers in tree.layer_indices(params).items():
    run, layer = prefix.split("/")
    for path, w in wrap.leaves(params[run][layer]):
      out |= {f"layers/{i}/{path}": tuple(w.shape[1:]) for i in layers}
  return out


def _wrong_dtype(path, key, tensor) -> UserError:
  return UserError(
    f"{path}: {key} is stored as {tensor.dtype}, expected one of "
    f"{', '.join(hf.DTYPES)}"
  )


def _check(path, tensors, methods, modules, params, whole) -> None:
  """Raises UserError unless the file holds exactly what is asked for."""
  sizes, wanted = wrap.matrices(params), {}
  for address, method in methods.items():
    for key, shape in _shapes_of(
      modules[address], method, sizes[address]
    ).items():
      # What modules share is as large as the largest of them wants.
      wanted[key] = tuple(map(max, wanted.get(key, shape), shape))
  missing = (set(wanted) | set(whole)) - set(tensors)
  extra = set(tensors) - set(wanted) - set(whole)
  if missing or extra:
    raise hf.difference(path, sorted(missing), sorted(extra))
  for key, shape in wanted.items():
    if tensors[key].shape != shape:
      raise UserError(
        f"{path}: {key} has shape {list(tensors[key].shape)}, expected "
        f"{list(shape)} by {peft_config.CONFIG} and the base model"
      )
    if str(tensors[key].dtype) not in hf.DTYPES:
      raise _wrong_dtype(path, key, tensors[key])


def save_adapter(
  directory: str | pathlib.Path,
  params: Params,
  model: Transformer,
  base_name: str,
  use_rslora: bool | None = None,
  whole: Collection[str] = (),
  resized: bool = False,
) -> None:
  """Writes the adapters in `params` as PEFT would have.

  Args:
    directory: made if need be.
    params: with AdaptedTensor leaves; one adapter a weight.
    model: the base.
    base_name: base_model_name_or_path: a name, or a directory, absolute or
      relative to `directory`.
    use_rslora: whether to state the scales of plain LoRA as `alpha / sqrt(r)`
      rather than `alpha / r`; None for as they are.
    whole: addresses of weights without adapter that differ from the base's.
    resized: whether the base has another number of tokens; both embeddings
      are written then, and whoever loads the adapter resizes the base first.

  Raises:
    UserError: there are no adapters, or PEFT has no way to say what they do.
  """
  directory = pathlib.Path(directory)
  modules = _modules(params, model)
  found = _adapters(params)
  if not found:
    raise UserError(f"{directory}: these parameters hold no adapter to save")
  nameless = sorted(set(found) - set(modules))
  if nameless:
    raise UserError(
      f"{directory}: PEFT's files have no name for an adapter on stacked "
      f"experts ({nameless[0]}).\nMerge it into the model instead."
    )
  tensors, methods, sizes = {}, {}, wrap.matrices(params)
  for path, w in found.items():
    module = modules[path]
    method, arrays = w.method.exported(w.arrays)
    if method.PEFT is None:
      raise UserError(
        f"{directory}: PEFT has no method {type(method).__name__}; merge it "
        "into the model, or convert it to plain LoRA first"
      )
    arrays = {k: np.asarray(x, np.float32) for k, x in arrays.items()}
    for key, x in _named(module, method, arrays, sizes[path]).items():
      tensors[key] = _joined(tensors[key], x) if key in tensors else x
    methods[module] = _stated(method, use_rslora)
  if model.tied and "embed" in found:
    tensors |= {copy: tensors[key].T for copy, key in _tied_keys()}
  kept, saved, bias = _whole(params, model, set(methods), set(whole), resized)
  config = peft_config.make_config(
    methods,
    list(modules.values()),
    base_name,
    saved,
    bias,
    # One matrix on both sides, which PEFT has to be told.
    model.tied and ("embed" in found or ("embed" in whole and not resized)),
  )
  try:
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.write_file(directory / WEIGHTS, tensors | kept)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / peft_config.CONFIG).write_text(text)
  except OSError as e:
    raise UserError(f"{directory}: cannot be written ({e.strerror})") from e


def _whole(params, model, adapted, changed, resized):
  """Returns (tensors, modules_to_save, bias mode) of what is no adapter."""
  base = peft_whole.base_weights(params, model)
  biases = {a for a, w in base.items() if w.name == "bias"}
  theirs = {a for a in biases if base[a].module in adapted}
  changed = changed - ({"embed", "head"} if resized else set())
  bias = "none"
  if changed & biases:
    bias = "lora_only" if changed & biases <= theirs else "all"
  saved = sorted({base[a].module for a in changed - biases})
  keys = peft_whole.required(base, adapted, saved, bias)
  if resized:
    keys |= peft_whole.embeddings(base, model.tied, keys, adapted)
  elif model.tied and "embed" in changed:
    copy = dataclasses.replace(base["embed"], module=peft_whole.HEAD)
    keys[f"{_PREFIX}{peft_whole.HEAD}.weight"] = copy
  read = parts.from_params(wrap.disable(params))
  out = {}
  for key, w in keys.items():
    x = np.asarray(weights.dense(read[peft_whole.addressed(w.address)].read()))
    out[key] = x.T if w.transposed else x
  return out, saved, bias


def _joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """Returns the array whose first rows and columns two modules have."""
  shape = tuple(map(max, one.shape, other.shape))
  out = np.zeros(shape, one.dtype)
  for x in (one, other):
    out[tuple(slice(n) for n in x.shape)] = x
  for x in (one, other):
    if not np.array_equal(out[tuple(slice(n) for n in x.shape)], x):
      raise UserError(
        "modules of this adapter should share an array and do not; adapters "
        "that were made apart cannot be saved as one"
      )
  return out


def _stated(method: Method, use_rslora: bool | None) -> Method:
  """Returns the same method with its scale over `r` or over `sqrt(r)`."""
  if use_rslora is None or not isinstance(method, LoRA):
    return method
  alpha = method.scale * (method.rank**0.5 if use_rslora else method.rank)
  return dataclasses.replace(method, alpha=alpha, rslora=use_rslora)


def _adapters(params: Params) -> dict[str, AdaptedTensor]:
  """Returns each layer's adapter without its base, by address."""
  out = {}

  def thin(w):
    if isinstance(w.w, AdaptedTensor):
      raise UserError("two adapters on one weight: merge one before saving")
    return dataclasses.replace(w, w=None, key=None)

  for path, leaf in wrap.leaves(tree.top(params)):
    if isinstance(leaf, AdaptedTensor):
      out[path] = thin(leaf)
  for prefix, layers in tree.layer_indices(params).items():
    run, layer = prefix.split("/")
    for path, leaf in wrap.leaves(params[run][layer]):
      if isinstance(leaf, AdaptedTensor):
        for k, i in enumerate(layers):
          one = jax.tree.map(lambda x, k=k: x[k], thin(leaf))
          out[f"layers/{i}/{path}"] = one
  return out
