"""A model from any source, written in any format, whole or not at all."""

import contextlib
import dataclasses
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.interop import gguf, native, sources
from research.interop import parts as part
from research.interop.gguf import recipe as gguf_recipe
from research.interop.gguf import write as gguf_write
from research.interop.hf import tokenizer as hf_tokenizer
from research.interop.hf import write as hf_write
from research.interop.quantized import (
  checkpoint_formats,
  compressed_activations,
)
from research.interop.quantized import write as quantized_write
from research.io import folders, safetensors
from research.lora import wrap
from research.lora.merge import changes
from research.quant import untied_embedding
from research.text import gguf_vocab
from research.typing import Params, UserError, WriteError


@contextlib.contextmanager
def _atomic_directory(to: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a directory that becomes `to` if nothing goes wrong."""
  to = to.absolute()
  try:
    to.parent.mkdir(parents=True, exist_ok=True)
    draft = pathlib.Path(tempfile.mkdtemp(dir=to.parent, prefix=f".{to.name}."))
  except OSError as e:
    raise WriteError(f"{to}: cannot be written ({e.strerror})") from e
  try:
    yield draft
    draft.chmod(0o755)
    if to.is_dir():
      to.rmdir()  # checked to be empty
    draft.rename(to)
  except OSError as e:
    raise WriteError(f"{to}: cannot be written ({e.strerror})") from e
  finally:
    shutil.rmtree(draft, ignore_errors=True)


def to_hf(
  source: sources.Source,
  to: pathlib.Path,
  dtype: str | None = None,
  shard_size: int = safetensors.SHARD_SIZE,
  rounding: changes.Rounding = changes.cast,
  least: float | None = None,
) -> changes.Log:
  """Writes a Hugging Face directory; adapters are merged.

  Args:
    dtype: to round to; None for each tensor's own, float32 if packed.
    shard_size: bytes a file.
    least: share of the adapters' updates that has to be left; None for any.

  Raises:
    UserError: less is left, so nothing is written.
  """
  folders.check_free(to)
  _warn_of_activations(source, None)
  source, log = _untied(source), changes.Log()
  describe = hf_write.config_json
  config = describe(source.model, source.config, dtype, source.hint)
  said, kept = config.get("torch_dtype", config.get("dtype")), _widest(source)
  if dtype is None and said not in (None, kept):
    config = describe(source.model, source.config, kept, source.hint)
  with _atomic_directory(to) as draft:
    hf_write.write_model(
      draft,
      source.model,
      source.parts,
      config,
      dtype,
      shard_size,
      log,
      rounding,
    )
    if least is not None:
      changes.check_kept(log.changes, least)
    _write_tokenizer(draft, source)
  return log


def _warn_of_activations(source: sources.Source, kept: Any) -> None:
  """Warns if the source rounds its activations, and the result does not."""
  if any(x is not None and x != kept for x in source.activations):
    warnings.warn(
      f"{source.origin.get('path')}: rounds activations, which the result does"
      " not: it has the weights alone.\nTo keep the rounding, convert to"
      " --format=orbax, or to the format it came in if scales are dynamic.",
      RuntimeWarning,
      stacklevel=3,
    )


def _untied(source: sources.Source) -> sources.Source:
  """Returns a source whose head is a parameter of its own, if it has another.

  Raises:
    UserError: adapters are on an embedding and its other head.
  """
  embed = source.parts.get(part.Address(None, "embed"))
  if embed is None or embed.kind != part.UNTIED:
    return source
  model, params = untied_embedding.untie(source.model, source.params())
  if model.tied:
    raise UserError(
      "embed: found adapters on an embedding whose head is another matrix;"
      " expected them merged, or on other matrices"
    )
  return dataclasses.replace(
    source,
    model=model,
    parts=part.from_params(params),
    params=lambda: params,
  )


def _widest(source: sources.Source) -> str:
  """Returns the type that holds all of a source's matrices, decoded.

  transformers 5 rounds what it loads to the type that config.json says.
  """
  parts = [p for p in source.parts.values() if len(p.shape) > 1]
  kinds = {"float32" if p.packed else p.kind for p in parts}
  return kinds.pop() if len(kinds) == 1 else "float32"


def _write_tokenizer(draft: pathlib.Path, source: sources.Source) -> None:
  hf_tokenizer.write(draft, source.files, source.tokenizer)


def to_gguf(
  source: sources.Source,
  to: pathlib.Path,
  recipe: gguf_recipe.Recipe | None = None,
  least: float | None = None,
) -> tuple[changes.Log, str, gguf_write.Summary]:
  """Writes a GGUF file; adapters are merged.

  Args:
    recipe: what the matrices are stored in; None keeps each one's type.
    least: share of the adapters' updates that has to be left; None for any.

  Returns:
    What changed, why the tokenizer stayed behind ("" if it did not), and what
    the file takes.
  """
  folders.check_free(to, file=True)
  _warn_of_activations(source, None)
  source, log, keys, reason = _untied(source), changes.Log(), {}, ""
  kept = source.metadata
  if kept is not None and not _is_unchanged(source):
    kept = None
  if kept is None and source.tokenizer is not None:
    keys, reason = gguf_vocab.from_tokenizer(
      source.tokenizer, source.model.vocab_size
    )
  to.absolute().parent.mkdir(parents=True, exist_ok=True)
  written = gguf_write.write_model(
    to,
    source.model,
    source.parts,
    recipe or gguf_recipe.Recipe(),
    log,
    given=kept,
    hint=source.hint,
    name=_name(source),
    tokenizer=keys,
  )
  if least is not None:
    try:
      changes.check_kept(log.changes, least)
    except UserError:
      to.unlink()
      raise
  return log, reason, written


def to_quantized(
  source: sources.Source,
  to: pathlib.Path,
  writer: checkpoint_formats.CheckpointFormat,
  requantize: bool = False,
  dtype: str | None = None,
  shard_size: int = safetensors.SHARD_SIZE,
  least: float | None = None,
) -> changes.Log:
  """Writes a Hugging Face directory in another tool's quantized form.

  Args:
    source: any; adapters are merged.
    requantize: whether matrices that do not fit it are quantized again.
    dtype: of what is not packed; None for each tensor's own.
    shard_size: bytes a file.
    least: share of the adapters' updates that has to be left; None for any.

  Raises:
    UserError: something does not fit, or less is left, so nothing is written.
  """
  folders.check_free(to)
  _warn_of_activations(source, writer.activations)
  source, log = _untied(source), changes.Log()
  with _atomic_directory(to) as draft:
    quantized_write.write_model(
      draft, source, writer, requantize, dtype, shard_size, log
    )
    if least is not None:
      changes.check_kept(log.changes, least)
    _write_tokenizer(draft, source)
  return log


def _is_unchanged(source: sources.Source) -> bool:
  """Whether the source's model is the one its GGUF metadata is of."""
  if source.base is None:
    return True
  return source.base.model == source.model.clone(
    remat="none", dtype=source.base.model.dtype
  )


def _name(source: sources.Source) -> str:
  return pathlib.Path(str(source.origin.get("path", ""))).name


def to_orbax(source: sources.Source, to: pathlib.Path) -> changes.Log:
  """Writes our own checkpoint: every bit, packed or adapted, is kept.

  Raises:
    UserError: the source rounds activations in a way that is not known here.
  """
  folders.check_free(to)
  params, log = source.params(), changes.Log()
  rounds = any(x is not None for x in source.activations)
  if rounds and not compressed_activations.rounding(params, ()):
    raise UserError(
      f"{source.origin.get('path')}: its base rounds activations in a way that"
      " is not applied here, such as by scales of a calibration.\nConvert to"
      " --format=hf for the weights alone."
    )
  have = part.from_params(params)
  for address, p in have.items():
    before = source.parts[address].kind
    if before == p.kind:
      log.same(str(address), before, p.kind)
    else:
      found = changes.dense_weight(source.parts[address].read())
      got = changes.dense_weight(p.read()).array.astype(np.float32)
      log.compared(str(address), before, p.kind, found, got)
  origin = {k: v for k, v in source.origin.items() if _plain(v)}
  if source.base_name is not None:
    origin["base"] = source.base_name
    if source.whole is not None:
      origin["whole"] = sorted(source.whole)
  config = hf_write.config_json(source.model, source.config, None, source.hint)
  with _atomic_directory(to) as draft:
    native.save(draft, source.model, params, config, origin)
    if source.metadata is not None and _is_unchanged(source):
      gguf.write_gguf(draft / native.METADATA, source.metadata, {})
    else:
      _write_tokenizer(draft, source)
  return log


def _plain(value: Any) -> bool:
  return isinstance(value, str | int | float | dict | None)


def to_peft(
  source: sources.Source,
  to: pathlib.Path,
  base: str | None = None,
  use_rslora: bool = False,
) -> changes.Log:
  """Writes an adapter in PEFT's format, with what else differs from the base.

  Args:
    base: the model that it adapts, if the source does not know.
    use_rslora: how scales are stated.

  Raises:
    UserError: there are no adapters, or the base is not known.
  """
  from research.interop import peft
  from research.interop.peft import names as peft_names

  folders.check_free(to)
  name = base or source.base_name
  if name is None:
    raise UserError(
      f"{source.origin.get('path')}: does not say which model it adapts; "
      "give it with --base="
    )
  under = source.base
  if under is None or base is not None:
    under = sources.open_source(name)
  if under.base is not None:  # an adapter that was trained further
    under, name = under.base, under.base_name
  params = source.params()
  different = brought_addresses(source, params, under)
  with _atomic_directory(to) as draft:
    peft.save_adapter(
      draft,
      params,
      source.model,
      name,
      use_rslora,
      different,
      source.model.vocab_size != under.model.vocab_size,
      peft_names.naming_of_config(under.config),
      sources.weights_of(under),
    )
  log = changes.Log()
  for tensor, x in safetensors.open_file(to / peft.WEIGHTS).items():
    log.same(tensor, str(x.dtype), str(x.dtype))
  return log


def to_gguf_adapter(
  source: sources.Source, to: pathlib.Path, kind: str = "F32"
) -> changes.Log:
  """Writes an adapter as llama.cpp reads it.

  Args:
    source: with adapters that are plain LoRA, or exported as such.
    kind: ggml's type of the factors.

  Raises:
    UserError: there are none, or they bring weights besides.
  """
  from research.interop.gguf import adapter as gguf_adapter
  from research.interop.peft import write as peft_write

  folders.check_free(to, file=True)
  params, base = source.params(), source.base
  if base is None and source.base_name is not None:
    base = sources.open_source(source.base_name)
  if base is not None:
    whole = brought_addresses(source, params, base)
    name, under = source.base_name or str(base.origin["path"]), base
    params, whole = peft_write.over_base(
      to, params, base.model, name, sources.weights_of(under), whole
    )
    if whole or source.model.vocab_size != base.model.vocab_size:
      raise UserError(
        f"{source.origin.get('path')}: contains full weights of "
        f"{sorted(whole)[0]}, which adapters of llama.cpp cannot have; merge "
        "it instead: --format=gguf"
      )
  return gguf_adapter.save(
    to,
    params,
    # PEFT unties what it adapts; the file that is adapted stays tied.
    source.model if base is None else base.model,
    hint=source.hint,
    name=_name(source),
    kind=kind,
  )


def brought_addresses(
  source: sources.Source, params: Params, base: sources.Source
) -> set[str]:
  """Returns the addresses of weights that an adapter has to bring whole.

  Packed matrices are none: no training changes codes, so they are the base's,
  rounded by a run's transform. Beside these, and without a note of what was
  trained, norms that differ may have been scaled by a transform; they are left
  for `over_base` to undo or refuse.

  Args:
    base: what the adapters are for.
  """
  if source.whole is not None:
    return set(source.whole)
  mine = part.from_params(wrap.disable(params))
  changed = changed_addresses(mine, base)
  packed = {str(a) for a, p in mine.items() if p.packed}
  if not changed & packed:
    return changed
  return {a for a in changed - packed if not a.endswith("norm/scale")}


def changed_addresses(mine: part.Parts, base: sources.Source) -> set[str]:
  """Returns the addresses at which weights are not the base's."""
  out = set()
  for address, p in mine.items():
    where = address
    if address not in base.parts and address.path == "head":
      where = dataclasses.replace(address, path="embed")
    if where not in base.parts:
      raise UserError(
        f"{address}: the base model has no such weight.\nExpected the model"
        " that the adapter was trained on; give another --base."
      )
    if not _equal(p, base.parts[where], transposed=where != address):
      out.add(str(address))
  return out


def _equal(a: part.Part, b: part.Part, transposed: bool) -> bool:
  if a.shape != (b.shape[::-1] if transposed else b.shape):
    return False
  x, y = (changes.dense_weight(p.read()).array for p in (a, b))
  y = y.T if transposed else y
  return np.array_equal(x, jnp.asarray(y).astype(x.dtype))
