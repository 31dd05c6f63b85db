"""Reads PEFT's adapters: adapter_config.json and adapter_model.safetensors.

Reading is strict where PEFT is not: a module that the configuration matches and
the file lacks, or the other way round, or an adapter that changes nothing is an
error, and so is every feature that is not understood here
(research/lora/MATH.md 7.2 to 7.4). Writing uses only fields and patterns that
mean the same after PEFT has sorted them.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import tree
from research.interop import hf
from research.interop.peft import (
  base_fingerprint,
  full_weights,
  validate,
)
from research.interop.peft import config as peft_config
from research.interop.peft import experts as peft_experts
from research.interop.peft import names as peft_names
from research.interop.peft.names import PREFIX
from research.interop.peft.targets import is_saved
from research.io import safetensors
from research.lora import wrap
from research.lora.method import MatrixSpec
from research.lora.methods.tokens import Tokens
from research.nn.transformer import Transformer
from research.typing import Params, UserError

WEIGHTS = "adapter_model.safetensors"

_INTEGERS = ("int32", "int64")


def load_adapter(
  directory: str | pathlib.Path, params: Params, model: Transformer
) -> dict[str, Any]:
  """Returns `params` with PEFT's adapter around its weights, in fp32.

  Raises:
    UserError: the adapter is damaged, does not fit, has a feature that is not
      supported, would change nothing, or makes another model of the base
      (`open_adapter` returns that, too).
  """
  adapted, again = open_adapter(directory, params, model)
  if again != model:
    raise UserError(
      f"{directory}: this adapter contains embeddings that change the model's "
      "configuration; load it as the model: --model=" + str(directory)
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
  file = _weights_of(directory)
  tensors, notes = safetensors.open_with_metadata(file)
  base_name = fields.get("base_model_name_or_path")
  base_fingerprint.check(file, base_name, notes, params)
  naming = peft_names.naming_of_keys(tensors)
  peft_names.check_language_alone(tensors, naming, file)
  params, model = _untied(fields, kind, params, model, naming)
  # --- what the configuration says ---
  modules = peft_names.modules(params, model, naming)
  methods = peft_config.read_methods(
    fields, kind, modules, wrap.matrices(params)
  )
  methods |= peft_config.read_token_rows(fields, methods, model.tied, naming)
  base = full_weights.base_weights(params, model, naming)
  everything = [w.module for w in base.values()]
  stacks = peft_experts.stacks(fields, params, kind.from_fields(fields))
  parameters = [stack.name for stack in stacks]
  names = list(modules.values())
  validate.warn(fields.values, fields.where, names, everything, parameters)
  # --- what the file holds ---
  adapted = {modules[address] for address in methods}
  whole = _whole(fields, base, adapted, tensors, model.tied, naming)
  params, model = _with_whole(file, tensors, whole, params, model)
  peft_config.check_token_rows(fields, methods, model.vocab_size)
  if model.tied and "embed" in methods:
    tensors = _without_copies(file, tensors, naming)
  tensors = _shared_once(file, tensors, methods, modules)
  experts = peft_experts.read(file, tensors, stacks)
  taken = {key for stack in stacks for key in stack.shapes}
  rest = {key: x for key, x in tensors.items() if key not in taken}
  _check(file, rest, methods, modules, params, whole)
  methods |= {p: s.method for s in stacks for p in s.addresses}
  return _wrapped(file, tensors, params, methods, modules, experts), model


def _weights_of(directory: pathlib.Path) -> pathlib.Path:
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
  return file


def _whole(fields, base, adapted, tensors, tied, naming):
  """Returns the weights that the file brings whole, by their keys.

  Those that it must, and embeddings where it has them.
  """
  whole = full_weights.required(
    base,
    adapted,
    peft_config.modules_to_save(fields),
    peft_config.bias_mode(fields),
  )
  sides = {naming.embedding, naming.head}
  for modules, rows in ((set(), set()), (sides, set()), (set(), sides)):
    optional = full_weights.embeddings(base, tied, whole, modules, naming, rows)
    whole |= {key: w for key, w in optional.items() if key in tensors}
  return whole


def _wrapped(file, tensors, params, methods, modules, experts):
  live = []

  def make(paths, method, w):
    del method  # of all; a file may hold less for some
    each = [
      (experts[p], {})
      if p in experts
      else _read(file, tensors, modules[p], methods[p], _one(w, k))
      for k, p in enumerate(paths)
    ]
    rows = zip(paths, each, strict=True)
    live.extend(not methods[p].is_noop(x | y) for p, (x, y) in rows)
    return jax.tree.map(_stacked, *each)

  settled = {path: method.canonical() for path, method in methods.items()}
  adapted = wrap.wrap(params, settled, make)
  if methods and not any(live):
    raise UserError(
      f"{file}: B (or A) is zero in every module, so the adapter changes "
      "nothing: it was saved before any training step"
    )
  return adapted


def _stacked(*arrays):
  x = np.stack(arrays)
  return jnp.asarray(x, x.dtype if x.dtype.kind in "iu" else jnp.float32)


def _one(w, k):
  return jax.tree.map(lambda x: x[k], w)


def _read(file, tensors, module, method, w):
  size = tuple(w.shape)
  place = MatrixSpec(*size, embedding=peft_names.is_embedding(module))
  found = {
    key.removeprefix(f"{PREFIX}{module}.").removeprefix("base_model."): key
    for key in peft_names.shapes_of(module, method, size)
  }
  found = {name: tensors[key].read() for name, key in found.items()}
  for name, x in found.items():
    if not np.isfinite(x.astype(np.float32)).all():
      raise UserError(
        f"{file}: {module}.{name} holds a number that is not finite; the run "
        "that wrote it had diverged"
      )
  return method.from_peft(found, place, w)


def _without_copies(path, tensors, naming):
  """Returns the tensors less a tied head's adapter, which says it again."""
  out = dict(tensors)
  turned = peft_names.tied_keys(naming)
  for copy, key in (*turned, *peft_names.tied_rows(naming)):
    if copy in tensors and key in tensors:
      theirs, own = tensors[copy].read(), tensors[key].read()
      how = " transposed" if (copy, key) in turned else ""
      if not np.array_equal(theirs, own.T if how else own):
        raise UserError(
          f"{path}: {copy} is not {key}{how}, although they are tied"
        )
      del out[copy]
  return out


def _shared_once(path, tensors, methods, modules):
  """Returns the tensors less what PEFT repeats for each module."""
  out = dict(tensors)
  for address, method in methods.items():
    for name in method.PEFT_SHARED:
      copy = f"{PREFIX}{modules[address]}.{name}"
      first = peft_names.key(modules[address], name, method)
      if copy in out and first in out:
        if not np.array_equal(out[copy].read(), out[first].read()):
          raise UserError(
            f"{path}: {copy} differs from {first}, which all modules share"
          )
        del out[copy]
  return out


def _untied(fields, kind, params, model, naming):
  """Returns the base, untied where PEFT changes one of its two sides."""
  if not model.tied or kind is Tokens or fields.flag("ensure_weight_tying"):
    return params, model
  sides = {"embed": naming.embedding, "head": naming.head}
  modules = peft_names.modules(params, model, naming) | sides
  touched = peft_config.read_methods(fields, kind, modules)
  saved = peft_config.modules_to_save(fields)
  for address, module in sides.items():
    if address in touched or is_saved(module, saved):
      return full_weights.untie(params, model)
  return params, model


def _with_whole(path, tensors, whole, params, model):
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
      f"{PREFIX}lm_head.weight beside it"
    )
  params = full_weights.replace(params, values)
  return params, model.clone(vocab_size=vocab)


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
  out = {p: tuple(w.shape) for p, w in wrap.leaves(tree.outer_params(params))}
  for prefix, layers in tree.layer_indices(params).items():
    run, layer = prefix.split("/")
    for path, w in wrap.leaves(params[run][layer]):
      out |= {f"layers/{i}/{path}": tuple(w.shape[1:]) for i in layers}
  return out


def _wrong_dtype(path, key, tensor, allowed=hf.DTYPES) -> UserError:
  return UserError(
    f"{path}: {key} is stored as {tensor.dtype}, expected one of "
    f"{', '.join(allowed)}"
  )


def _check(path, tensors, methods, modules, params, whole) -> None:
  """Raises UserError unless the file holds exactly what is asked for."""
  sizes, wanted, whole_numbers = wrap.matrices(params), {}, set()
  for address, method in methods.items():
    for key, x in peft_names.shapes_of(
      modules[address], method, sizes[address]
    ).items():
      # What modules share is as large as the largest of them wants.
      wanted[key] = tuple(map(max, wanted.get(key, x.shape), x.shape))
      whole_numbers |= {key} if x.dtype.kind in "iu" else set()
    for name, least in method.shared_shapes().items():
      key = peft_names.key(modules[address], name, method)
      wanted[key] = tuple(map(max, wanted[key], least))
  missing = (set(wanted) | set(whole)) - set(tensors)
  extra = set(tensors) - set(wanted) - set(whole)
  if missing or extra:
    what = f"{peft_config.CONFIG} and the base model; is that the adapter's own"
    raise hf.mismatch(path, sorted(missing), sorted(extra), f"{what}?")
  for key, shape in wanted.items():
    if tensors[key].shape != shape:
      raise UserError(
        f"{path}: {key} has shape {list(tensors[key].shape)}, expected "
        f"{list(shape)} by {peft_config.CONFIG} and the base model"
      )
    allowed = _INTEGERS if key in whole_numbers else hf.DTYPES
    if str(tensors[key].dtype) not in allowed:
      raise _wrong_dtype(path, key, tensors[key], allowed)
