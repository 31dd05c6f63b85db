"""Any model by name: what `--model=` takes.

A Hugging Face directory, a PEFT adapter's, a run's working directory, a GGUF
file, the name of a model in the package index, or `org/name` on the Hub.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import jax

from research import progress
from research.interop import hf, quantized
from research.interop.diffusion import spec
from research.interop.hf import config as hf_config
from research.interop.loaded import ADAPTER_CONFIG, NOTE, Loaded
from research.interop.packages import PACKAGES, check_name, packaged
from research.interop.quantized import compressed_activations
from research.interop.vision import families
from research.io import safetensors, unread
from research.text import special_tokens
from research.training import memory
from research.training.checkpoints import workdir
from research.typing import UserError
from research.vlm.contrastive.dual_encoder import DualEncoder
from research.vlm.model import VisionLanguageModel

CONFIG = "config.json"

MODEL = "model"
"""In a run's working directory: what it trained whole, Hugging Face's way."""

Towers = Literal["language", "all"]
"""What of a vision language model is loaded, see `load_model`."""

Packed = bool | Literal["any"] | None
"""What becomes of quantized weights, see `load_model`."""

_HUB_FILES = ("*.json", "*.safetensors", "*.jinja")


def load_model(
  name: str | os.PathLike,
  dtype: str = "float32",
  packed: Packed = None,
  shardings: unread.Shardings | None = None,
  towers: Towers = "language",
  image_size: Callable[[Loaded], Loaded] | None = None,
) -> Loaded:
  """Returns the model that `name` stands for.

  Args:
    name: a directory (Hugging Face, PEFT adapter, or a run's), a .gguf file,
      one of `PACKAGES`, or `org/name` on the Hub.
    packed: keep quantized weights as they are in the file; "any": if there are
      any. None: those of Hugging Face directories; weights of .gguf files and
      of our checkpoints are decoded. Quantized models with images are an error.
    shardings: from the tree of the parameters' shapes to one of
      `jax.sharding.Sharding`s: each device's part, and no more, is read for
      it; but for towers of images, which each process reads whole. None puts
      whole arrays on the default device.
    towers: of a vision language model: its language model alone, or all of it,
      which then is a `research.vlm.VisionLanguageModel`. CLIP, SigLIP and
      SigLIP 2 are loaded with "all" alone, as a `DualEncoder`.
    image_size: what makes it a model for images of another size, see
      `research.interop.vision.ImageSize`; None for the published one.

  Raises:
    UserError: it is none of these, or damaged, or not supported.
  """
  if dtype not in hf.DTYPES:
    raise UserError(
      f"dtype is {dtype!r}, expected one of {', '.join(hf.DTYPES)}"
    )
  path = locate(name)
  with progress.phase(f"reading {name}"):
    if path.is_dir():
      found = _directory(path, dtype, packed, shardings, towers)
      found = _as_trained(found, last_stage(pathlib.Path(name)))
    else:
      from research.interop.gguf.read import load_gguf

      found = load_gguf(path, dtype, bool(packed), shardings)
    if image_size is not None:
      found = image_size(found)
    if isinstance(found.model, VisionLanguageModel | DualEncoder):
      from research.interop.vision import read

      found = read.placed(found, shardings)
    return found


def locate(name: str | os.PathLike) -> pathlib.Path:
  """Returns the directory or .gguf file that `name` stands for.

  Raises:
    UserError: there is none.
  """
  check_name(name)
  path = pathlib.Path(name)
  if path.is_dir():
    return _of_run(last_stage(path))
  if str(name) in PACKAGES:
    return packaged(str(name))
  return path if path.is_file() else _downloaded(str(name))


def last_stage(path: pathlib.Path) -> pathlib.Path:
  """Returns the working directory of a run's last stage, or else `path`."""
  names = workdir.stage_names(path)
  return path / names[-1] if names else path


def _of_run(path: pathlib.Path) -> pathlib.Path:
  """Returns the model that a run wrote whole, or else `path` itself.

  Beside an adapter that is the base that it was trained over, under it.
  """
  whole = path / MODEL
  if (path / "config.gin").is_file() and (whole / CONFIG).is_file():
    return whole
  return path


def _as_trained(loaded: Loaded, path: pathlib.Path) -> Loaded:
  """Returns a run's model, its tokenizer putting around texts what it did."""
  note = path / special_tokens.FILE
  if loaded.tokenizer is None or not note.is_file():
    return loaded
  words = dataclasses.replace(
    loaded.tokenizer, documents=special_tokens.read(note)
  )
  return dataclasses.replace(loaded, tokenizer=words)


def adapter_directory(path: pathlib.Path) -> pathlib.Path | None:
  """Returns the adapter's own directory in an adapter's or a run's, or None.

  Raises:
    UserError: a run that has not written one, or neither of these nor a model.
  """
  if (path / ADAPTER_CONFIG).is_file():
    return path
  if (path / "config.gin").is_file():
    if (path / "adapter" / ADAPTER_CONFIG).is_file():
      return path / "adapter"
    raise UserError(
      f"{path}: this run has not written adapter/{ADAPTER_CONFIG} or "
      f"{MODEL}/ yet.\n"
      "Finish it with experiments.train --workdir, then retry."
    )
  if not (path / CONFIG).is_file():
    raise UserError(
      f"{path}: found neither config.json (a model), {ADAPTER_CONFIG} (an "
      "adapter) nor config.gin (a run) in this directory"
    )
  return None


def _is_adapter(path: pathlib.Path) -> bool:
  """Whether a name stands for an adapter, or for a run that has left one."""
  if (path / ADAPTER_CONFIG).is_file():
    return True
  path = last_stage(path) if path.is_dir() else path
  run = (path / "config.gin").is_file()
  return run and (path / "adapter" / ADAPTER_CONFIG).is_file()


def _directory(path: pathlib.Path, dtype, packed, shardings, towers) -> Loaded:
  if (path / NOTE).is_file():
    return _ours(path, dtype, bool(packed), shardings)
  adapter = adapter_directory(path)
  if adapter is not None:
    return _adapted(adapter, dtype, packed, shardings, towers)
  config = safetensors.read_json(path / CONFIG)
  if packed is True and not quantized.is_quantized(config, path):
    raise UserError(
      f"{path}: packed weights come from .gguf files and from directories "
      "that a tool has quantized; these tensors are not, so load them without "
      "packed"
    )
  families.check_naming(config, path / CONFIG)
  kind = hf_config.kind_of(config, str(path / CONFIG))
  # Gemma 3's language model is read as other families' are, packed or not.
  if kind in families.MODULES and (towers == "all" or kind != "gemma3"):
    from research.interop.vision import read

    one = read.load if towers == "all" else read.load_language
    return one(path, dtype, config, shardings)
  if kind in families.CONTRASTIVE and towers == "all":
    from research.interop.vision import read

    return read.load(path, dtype, config)
  words = tokenizer(path)
  memory.trim()  # reading it took more than it keeps
  model, params, source = hf.model_from_directory(
    path, dtype, shardings, packed is not False, config
  )
  if packed is not False:
    quantization = source.get("quantization")
    params = compressed_activations.round_inputs(
      params, quantization, str(path / CONFIG)
    )
  how = spec.from_config(source["config"], str(path / CONFIG))
  return Loaded(model, params, words, source, how)


def _ours(path: pathlib.Path, dtype, packed, shardings) -> Loaded:
  from research.interop import native
  from research.quant import untied_embedding

  config = safetensors.read_json(path / CONFIG)
  tied, params, source = native.load(path, dtype, shardings, config)
  model = untied_embedding.untie_model(tied, params)

  def cast(params):
    params = untied_embedding.untie(tied, params)[1]
    return native.cast(params, dtype=dtype, packed=packed)

  left = shardings is unread.unplaced
  params = jax.eval_shape(cast, params) if left else cast(params)
  if shardings is not None:
    # Decoded weights are cut as arrays are, no longer as blocks.
    params = unread.moved(params, shardings)
  source = dict(format="orbax", path=str(path), came_from=source)
  how = spec.from_config(config, str(path / CONFIG))
  return Loaded(model, params, native.tokenizer(path), source, how)


def tokenizer(path: pathlib.Path) -> Any:
  """Returns the tokenizer in a directory, or None."""
  if not (path / "tokenizer.json").is_file():
    return None
  from research.text.tokenizer import Tokenizer

  return Tokenizer.from_directory(path)


def adapter_tokenizer(path: pathlib.Path, base: Any) -> Any:
  """Returns the tokenizer beside an adapter, or else its base's.

  One is there where tokens were added, or the chat template is another. What
  ends the base's texts, by its own files, ends the adapter's, too.
  """
  own = tokenizer(path)
  if own is None or base is None:
    return own or base
  stop = tuple(dict.fromkeys((*own.stop, *base.stop)))
  return dataclasses.replace(own, stop=stop, documents=base.documents)


def adapter_base(path: pathlib.Path) -> tuple[str, str | pathlib.Path]:
  """Returns what an adapter calls its base, and where that is.

  Raises:
    UserError: it does not say, or names an adapter.
  """
  config = safetensors.read_json(path / ADAPTER_CONFIG)
  base = config.get("base_model_name_or_path")
  if not isinstance(base, str) or not base:
    raise UserError(
      f"{path / ADAPTER_CONFIG}: base_model_name_or_path is {base!r}, "
      "expected the name or directory of the model that it adapts"
    )
  # A known name stays one even where a directory happens to be called so.
  beside = pathlib.Path(os.path.normpath(path / base))
  target = beside if base not in PACKAGES and beside.exists() else base
  if _is_adapter(pathlib.Path(target)):
    raise UserError(
      f"{path / ADAPTER_CONFIG}: its base {target} is an adapter itself; "
      "expected a model. Merge that adapter into its own base first."
    )
  return base, target


def _adapted(path: pathlib.Path, dtype, packed, shardings, towers) -> Loaded:
  from research.interop.vision import adapters

  _, target = adapter_base(path)
  try:
    loaded = load_model(target, dtype, packed, shardings, towers)
  except UserError as e:
    raise UserError(f"{path / ADAPTER_CONFIG}: its base: {e}") from e
  models = []

  def opened(params):
    params, model = adapters.open_adapter(path, params, loaded.model)
    models.append(model)
    return params

  if shardings is unread.unplaced:
    params = jax.eval_shape(opened, loaded.params)
  else:
    params = opened(loaded.params)
  if shardings is not None:
    params = unread.moved(params, shardings)
  return dataclasses.replace(
    loaded,
    model=models[-1],
    params=params,
    tokenizer=adapter_tokenizer(path, loaded.tokenizer),
    source=dict(format="peft", path=str(path), base=loaded.source),
  )


def _downloaded(name: str) -> pathlib.Path:
  try:
    import huggingface_hub
  except ImportError as e:
    raise UserError(
      f"{name}: no such directory, and huggingface_hub, which would download "
      "it, is not installed.\nRun: pip install huggingface_hub"
    ) from e
  try:
    place = huggingface_hub.snapshot_download(
      name, allow_patterns=list(_HUB_FILES), etag_timeout=10
    )
  except (OSError, ValueError) as e:
    reason = str(e).strip().split("\n")[0][:160]
    raise UserError(
      f"{name}: no such directory, and the Hub did not provide it: "
      f"{type(e).__name__}: {reason}\n"
      "Check the name and the network, or download it and give its directory."
    ) from e
  return pathlib.Path(place)
