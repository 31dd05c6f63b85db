"""From any format to any other: the sources, and how each target is written.

A source gives its parameters one by one (`parts`), so that a model passes
through without ever being in memory as a whole, unless it has to be: an
adapter over its base, or our own checkpoint, which holds stacked layers.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from research.interop import (
  changes,
  gguf,
  gguf_export,
  gguf_vocab,
  hf,
  hf_config,
  hf_export,
  load,
  ours,
  safetensors,
)
from research.interop import parts as part
from research.nn.tokenizer import Tokenizer
from research.nn.transformer import Transformer
from research.typing import Params, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """A model to be converted.

  Attributes:
    model: how it computes.
    parts: its parameters, unread, as they are stored.
    params: returns the tree, in the stored types.
    origin: a JSON object: format, path, and so on.
    tokenizer: or None.
    files: a directory whose tokenizer files go along, or None.
    config: its config.json, or None.
    metadata: of the GGUF file it was, or None.
    base: what an adapter stands on, or None.
    base_name: what the adapter calls that.
  """

  model: Transformer
  parts: part.Parts
  params: Callable[[], Params] = dataclasses.field(repr=False)
  origin: Mapping[str, Any]
  tokenizer: Tokenizer | None = None
  files: pathlib.Path | None = None
  config: Mapping[str, Any] | None = None
  metadata: Mapping[str, Any] | None = None
  base: "Source | None" = None
  base_name: str | None = None

  @property
  def hint(self) -> str | None:
    """The model_type that it has or had."""
    if self.config is not None:
      fields = hf_config.text_fields(self.config, "config.json")
      return fields.values["model_type"]
    return None


def open_source(name: str | os.PathLike) -> Source:
  """Returns what `--model=` would load, but unread.

  Args:
    name: anything that `load.load_model` takes, except a run that trained
      something else than adapters.

  Raises:
    UserError: it is missing, damaged or not supported.
  """
  path = pathlib.Path(load.locate(name))
  if path.is_file():
    return _gguf(path)
  if (path / load.NOTE).is_file():
    return _ours(path)
  found = load.adapter_directory(path)
  if found is not None:
    return _adapter(found)
  return _hf(path)


def _hf(path: pathlib.Path) -> Source:
  model, tensors, origin = hf.open_model(path)
  return Source(
    model=model,
    parts=hf.read_parts(model, tensors, path),
    params=lambda: hf.read_params(model, tensors, None, path),
    origin={k: v for k, v in origin.items() if k != "config"},
    tokenizer=load.tokenizer(path),
    files=path,
    config=origin["config"],
  )


def _gguf(path: pathlib.Path) -> Source:
  from research.interop import gguf_model

  file = gguf.open_gguf(path)
  model, parts, tokenizer = gguf_model.open_model(str(path), file)
  config = hf_config.describe(model, gguf_model.model_type(file))

  def params():
    # Types of their own, so layers that differ get runs of their own.
    return gguf_model.load_gguf(path, dtype=None, packed=True).params

  return Source(
    model=model,
    parts=parts,
    params=params,
    origin=dict(format="gguf", path=str(path)),
    tokenizer=tokenizer,
    config=config,
    metadata=file.metadata,
  )


def _ours(path: pathlib.Path) -> Source:
  model, params, origin = ours.load(path)
  metadata = None
  if (path / ours.METADATA).is_file():
    metadata = gguf.open_gguf(path / ours.METADATA).metadata
  base_name = origin.get("base")
  return Source(
    model=model,
    parts=part.from_params(params),
    params=lambda: params,
    origin=dict(format="orbax", path=str(path), came_from=dict(origin)),
    tokenizer=ours.tokenizer(path),
    files=path if metadata is None else None,
    config=safetensors.read_json(path / "config.json"),
    metadata=metadata,
    base_name=base_name if isinstance(base_name, str) else None,
  )


def _adapter(path: pathlib.Path) -> Source:
  from research.lora import peft

  name, target = load.base_of(path)
  base = open_source(str(target))
  if base.base is not None:
    raise UserError(
      f"{path}: its base {target} is an adapter itself; expected a model. "
      "Merge that adapter into its own base first (--format=hf)."
    )
  params, model = peft.open_adapter(path, base.params(), base.model)
  return with_params(
    base,
    model,
    params,
    origin=dict(format="peft", path=str(path), base=str(target)),
    base_name=name if str(target) == name else str(target.resolve()),
  )


def with_params(
  base: Source,
  model: Transformer,
  params: Params,
  origin: Mapping[str, Any],
  base_name: str | None,
) -> Source:
  """Returns what training made of `base`: its tokenizer, other weights."""
  return dataclasses.replace(
    base,
    model=model,
    parts=part.from_params(params),
    params=lambda: params,
    origin=origin,
    base=base,
    base_name=base_name,
  )


@contextlib.contextmanager
def _whole(to: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a directory that becomes `to` if nothing goes wrong."""
  to = to.absolute()
  try:
    to.parent.mkdir(parents=True, exist_ok=True)
    draft = pathlib.Path(tempfile.mkdtemp(dir=to.parent, prefix=f".{to.name}."))
  except OSError as e:
    raise UserError(f"{to}: cannot be written ({e.strerror})") from e
  try:
    yield draft
    draft.chmod(0o755)
    if to.is_dir():
      to.rmdir()  # checked to be empty
    draft.rename(to)
  except OSError as e:
    raise UserError(f"{to}: cannot be written ({e.strerror})") from e
  finally:
    shutil.rmtree(draft, ignore_errors=True)


def free(to: pathlib.Path) -> None:
  """Raises UserError if writing to `to` would replace something."""
  if to.is_dir() and not any(to.iterdir()):
    return
  if to.exists() or to.is_symlink():
    raise UserError(
      f"{to}: is already there; expected a new name. Move or delete it first."
    )


def to_hf(
  source: Source,
  to: pathlib.Path,
  dtype: str | None = None,
  shard_size: int = safetensors.SHARD_SIZE,
) -> changes.Log:
  """Writes a Hugging Face directory; adapters are merged.

  Args:
    source: any.
    to: a new directory.
    dtype: to round to; None for each tensor's own, float32 if packed.
    shard_size: bytes a file.
  """
  free(to)
  log = changes.Log()
  kept = dtype
  if kept is None and all(p.packed for p in _matrices(source)):
    kept = "float32"
  config = hf_export.config_json(source.model, source.config, kept, source.hint)
  with _whole(to) as draft:
    hf_export.write_model(
      draft, source.model, source.parts, config, dtype, shard_size, log
    )
    _write_tokenizer(draft, source)
  return log


def _matrices(source: Source) -> list[part.Part]:
  return [p for p in source.parts.values() if len(p.shape) > 1]


def _write_tokenizer(draft: pathlib.Path, source: Source) -> None:
  hf_export.write_tokenizer(draft, source.files, source.tokenizer)


def to_gguf(
  source: Source, to: pathlib.Path, kind: str | None = None
) -> tuple[changes.Log, str]:
  """Writes a GGUF file; adapters are merged.

  Args:
    source: any.
    to: a new file.
    kind: ggml's type of the matrices; None keeps each one's.

  Returns:
    What changed, and why the tokenizer stayed behind ("" if it did not).
  """
  free(to)
  if kind is not None and kind not in gguf_export.FILE_TYPES:
    raise UserError(
      f"--format=gguf:{kind}: expected one of "
      f"{', '.join(gguf_export.FILE_TYPES)}"
    )
  log, keys, reason = changes.Log(), {}, ""
  kept = source.metadata
  if kept is not None and not _still(source):
    kept = None
  if kept is None and source.tokenizer is not None:
    keys, reason = gguf_vocab.from_tokenizer(
      source.tokenizer, source.model.vocab_size
    )
  to.absolute().parent.mkdir(parents=True, exist_ok=True)
  gguf_export.write_model(
    to,
    source.model,
    source.parts,
    kind,
    log,
    given=kept,
    hint=source.hint,
    name=_name(source),
    tokenizer=keys,
  )
  return log, reason


def _still(source: Source) -> bool:
  """Whether the source's model is the one its GGUF metadata is of."""
  if source.base is None:
    return True
  return source.base.model == source.model.clone(
    remat="none", dtype=source.base.model.dtype
  )


def _name(source: Source) -> str:
  return pathlib.Path(str(source.origin.get("path", ""))).name


def to_orbax(source: Source, to: pathlib.Path) -> changes.Log:
  """Writes our own checkpoint: every bit, packed or adapted, is kept.

  Args:
    source: any.
    to: a new directory.
  """
  free(to)
  params, log = source.params(), changes.Log()
  have = part.from_params(params)
  for address, p in have.items():
    before = source.parts[address].kind
    if before == p.kind:
      log.same(str(address), before, p.kind)
    else:
      found = changes.read(source.parts[address].read())
      got = changes.read(p.read()).array.astype(np.float32)
      log.compared(str(address), before, p.kind, found, got)
  origin = {k: v for k, v in source.origin.items() if _plain(v)}
  if source.base_name is not None:
    origin["base"] = source.base_name
  config = hf_export.config_json(source.model, source.config, None, source.hint)
  with _whole(to) as draft:
    ours.save(draft, source.model, params, config, origin)
    if source.metadata is not None and _still(source):
      gguf.write_gguf(draft / ours.METADATA, source.metadata, {})
    else:
      _write_tokenizer(draft, source)
  return log


def _plain(value: Any) -> bool:
  return isinstance(value, str | int | float | dict | None)


def to_peft(
  source: Source,
  to: pathlib.Path,
  base: str | None = None,
  use_rslora: bool = False,
) -> changes.Log:
  """Writes an adapter in PEFT's format, with what else differs from the base.

  Args:
    source: with adapters.
    to: a new directory.
    base: the model that it adapts, if the source does not know.
    use_rslora: how scales are stated.

  Raises:
    UserError: there are no adapters, or the base is not known.
  """
  from research.lora import adapt, peft

  free(to)
  name = base or source.base_name
  if name is None:
    raise UserError(
      f"{source.origin.get('path')}: does not say which model it adapts; "
      "give it with --base="
    )
  under = source.base
  if under is None or base is not None:
    under = open_source(name)
  params = source.params()
  different = _differing(part.from_params(adapt.disable(params)), under)
  with _whole(to) as draft:
    peft.save_adapter(
      draft,
      params,
      source.model,
      name,
      use_rslora,
      different,
      source.model.vocab_size != under.model.vocab_size,
    )
  log = changes.Log()
  for tensor, x in safetensors.open_file(to / peft.WEIGHTS).items():
    log.same(tensor, str(x.dtype), str(x.dtype))
  return log


def _differing(mine: part.Parts, base: Source) -> set[str]:
  """Returns the addresses at which weights are not the base's."""
  out = set()
  for address, p in mine.items():
    where = address
    if address not in base.parts and address.path == "head":
      where = dataclasses.replace(address, path="embed")
    if where not in base.parts:
      raise UserError(f"{address}: the base model has no such weight")
    if not _equal(p, base.parts[where], turned=where != address):
      out.add(str(address))
  return out


def _equal(a: part.Part, b: part.Part, turned: bool) -> bool:
  if a.shape != (b.shape[::-1] if turned else b.shape):
    return False
  x, y = (changes.read(p.read()).array for p in (a, b))
  y = y.T if turned else y
  return np.array_equal(x, jnp.asarray(y).astype(x.dtype))
