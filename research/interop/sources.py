"""Models to be converted: what `--model=` takes, opened but unread.

A source gives its parameters one by one (`parts`), so that a model passes
through without ever being in memory as a whole, unless it has to be: an
adapter over its base, or our own checkpoint, which holds stacked layers.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from research import progress, tree
from research.interop import gguf, hf, load, native
from research.interop import parts as part
from research.interop.hf import config as hf_config
from research.interop.loaded import NOTE, Loaded
from research.interop.quantized import compressed_activations
from research.interop.vision import families
from research.io import safetensors
from research.lora import wrap
from research.nn.transformer import Transformer
from research.text.tokenizer import Tokenizer
from research.typing import Params, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """A model to be converted.

  Attributes:
    parts: its parameters, unread, as they are stored.
    params: returns the tree, in the stored types.
    origin: a JSON object: format, path, and so on.
    tokenizer: or None.
    files: a directory whose tokenizer files go along, or None.
    config: its config.json, or None.
    metadata: of the GGUF file it was, or None.
    base: what an adapter stands on, or None.
    base_name: what the adapter calls that.
    activations: how inputs of matrices are rounded, for each group of modules,
      see `compressed_activations`; None for a group's that are not.
    unrounded: returns `params` of a directory without what rounds inputs, which
      `params` refuses where it is not known here.
    whole: addresses of what a run with adapters trained besides them; None
      where only a comparison with the base can tell.
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
  activations: tuple[Any, ...] = ()
  unrounded: Callable[[], Params] | None = dataclasses.field(
    default=None, repr=False
  )
  whole: frozenset[str] | None = None

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
    name: anything that `load.load_model` takes.

  Raises:
    UserError: it is missing, damaged or not supported.
  """
  path = pathlib.Path(load.locate(name))
  with progress.phase(f"opening {name}"):
    if path.is_file():
      return _gguf(path)
    if (path / NOTE).is_file():
      return _ours(path)
    found = load.adapter_directory(path)
    return _hf(path) if found is None else _adapter(found)


def _hf(path: pathlib.Path) -> Source:
  file = path / "config.json"
  kind = hf_config.kind_of(safetensors.read_json(file), str(file))
  if kind in families.MODULES and kind != "gemma3":
    raise UserError(
      f"{path}: found model_type {kind!r}, a vision language model, expected a"
      " language model: the formats that are written here, GGUF included, have"
      " no image encoder"
    )
  model, tensors, origin = hf.open_model(path)

  quantization = origin.get("quantization")

  def unrounded():
    return hf.read_params(model, tensors, None, path, packed=True)

  def params():
    return compressed_activations.round_inputs(
      unrounded(), quantization, str(file)
    )

  return Source(
    model=model,
    parts=hf.read_parts(model, tensors, path),
    params=params,
    origin={k: v for k, v in origin.items() if k != "config"},
    tokenizer=load.tokenizer(path),
    activations=compressed_activations.stated(quantization),
    unrounded=unrounded,
    files=path,
    config=origin["config"],
  )


def _gguf(path: pathlib.Path) -> Source:
  from research.interop.gguf import architectures as gguf_architectures
  from research.interop.gguf import read as gguf_read

  file = gguf.open_gguf(path)
  model, parts, tokenizer = gguf_read.open_model(str(path), file)
  config = hf_config.describe(
    model, gguf_architectures.model_type(file.metadata)
  )

  def params():
    # Types of their own, so layers that differ get runs of their own.
    return gguf_read.load_gguf(path, dtype=None, packed=True).params

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
  model, params, origin = native.load(path)
  metadata = None
  if (path / native.METADATA).is_file():
    metadata = gguf.open_gguf(path / native.METADATA).metadata
  base_name = origin.get("base")
  return Source(
    model=model,
    parts=part.from_params(params),
    params=lambda: params,
    origin=dict(format="orbax", path=str(path), came_from=dict(origin)),
    activations=compressed_activations.rounding(
      params, compressed_activations.stated(origin.get("quantization"))
    ),
    tokenizer=native.tokenizer(path),
    files=path if metadata is None else None,
    config=safetensors.read_json(path / "config.json"),
    metadata=metadata,
    base_name=base_name if isinstance(base_name, str) else None,
    whole=_noted(origin),
  )


def _noted(origin: Mapping[str, Any]) -> frozenset[str] | None:
  """Returns `Source.whole` as a checkpoint of ours notes it."""
  whole = origin.get("whole")
  return None if not isinstance(whole, list) else frozenset(map(str, whole))


def _adapter(path: pathlib.Path) -> Source:
  from research.interop import peft

  name, target = load.adapter_base(path)
  base = open_source(str(target))
  if base.base is not None:
    raise UserError(
      f"{path}: its base {target} is an adapter itself; expected a model. "
      "Merge that adapter into its own base first (--format=hf)."
    )
  params, model = peft.open_adapter(path, weights_of(base), base.model)
  made = with_params(
    base,
    model,
    params,
    origin=dict(format="peft", path=str(path), base=str(target)),
    base_name=name if str(target) == name else str(target.resolve()),
  )
  made = dataclasses.replace(made, activations=base.activations)
  words = load.adapter_tokenizer(path, base.tokenizer)
  if words is base.tokenizer:
    return made
  # Neither the base's files nor its metadata have this one.
  return dataclasses.replace(made, tokenizer=words, files=None, metadata=None)


def weights_of(base: Source) -> Params:
  """Returns what an adapter stands on: weights alone, if rounding is refused.

  Merged weights and the adapter itself do not depend on it; `convert.to_orbax`
  refuses it.
  """
  try:
    return base.params()
  except UserError:
    if base.unrounded is None:
      raise
    return base.unrounded()


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
    activations=compressed_activations.rounding(params, base.activations),
    unrounded=None,
    whole=None,
  )


def from_training(
  loaded: Loaded,
  params: Params,
  origin: Mapping[str, Any],
  name: str | None = None,
  start: Params | None = None,
) -> Source:
  """Returns what a run made of the model that it loaded.

  Args:
    start: weights before the first step, after the run's transforms; None
      where they are not known.
  """
  path = loaded.source.get("path")
  if path is None or _of_images(loaded):  # or trained from scratch
    return Source(
      model=loaded.model,
      parts=part.from_params(params),
      params=lambda: params,
      origin=origin,
      tokenizer=loaded.tokenizer,
      activations=compressed_activations.rounding(params, ()),
    )
  made = with_params(open_source(path), loaded.model, params, origin, name)
  if start is None or not tree.count(tree.partition(params, wrap.TRAINABLE)[0]):
    return made
  before, after = (part.from_params(wrap.disable(x)) for x in (start, params))
  whole = {str(a) for a, p in after.items() if not p.equals(before[a])}
  return dataclasses.replace(made, whole=frozenset(whole))


def _of_images(loaded: Loaded) -> bool:
  source = loaded.source.get("base", loaded.source)
  kind = source.get("model_type")
  return kind in families.MODULES and isinstance(loaded.model, Transformer)
