"""Features of a frozen encoder, computed once for each view.

Where the encoder does not learn, a view has the same features in every epoch:
`CachedFeatures` in the place of `data.Pixels` puts them into batches, and a
step begins at the connector. A view is known by the hash of its pixels, which
are those of the image after its preprocessing, and its features are of one
encoder, by the hash of its hyper-parameters and weights.
"""

import collections
import dataclasses
import hashlib
import os
import pathlib
import re
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research import tree
from research.data.packing import Row
from research.io import folders
from research.typing import Array, Float, Params, UInt8, UserError
from research.vlm.data import ViewPixels
from research.vlm.encoders.grouped import GroupedViews
from research.vlm.encoders.native import Patches
from research.vlm.model import VisionLanguageModel

_CHUNK = 8
"""Views that are encoded at a time, so that one program is compiled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedFeatures:
  """Features in the place of views; `with_encoder` says whose.

  Attributes:
    folder: where features are written, so that the next run finds them; None
      for this process's memory alone.
    megabytes: of features in memory; those used longest ago go first.
  """

  folder: str | None = None
  megabytes: int = 1024

  def __call__(self, pixels: ViewPixels, used: int) -> Row:
    """Refuses: there is no encoder yet.

    Raises:
      UserError: always.
    """
    raise UserError(
      "CachedFeatures: found no encoder; expected data of an experiment, which"
      " gives it one (with_encoder)"
    )

  def with_encoder(
    self, model: VisionLanguageModel, params: Params, trainable: str
  ) -> "EncodedViews":
    """Returns what makes features of views by this encoder.

    Args:
      trainable: regular expression of the paths that are learned.

    Raises:
      UserError: the encoder is trained, or its features are no grid of patches.
    """
    vision = {"vision": params["vision"]}
    learned = [
      x for x, _ in tree.flatten_paths(vision) if re.search(trainable, x)
    ]
    if learned:
      raise UserError(
        f"CachedFeatures: found that {learned[0]} is trained (trainable ="
        f" {trainable!r}), expected a frozen encoder, whose features do not"
        " change; use pixels, or train other paths"
      )
    if model.features.class_token:
      raise UserError(
        "CachedFeatures: found features of the class token, expected those of"
        " patches alone; use pixels"
      )
    if jax.process_count() > 1:
      raise UserError(
        f"CachedFeatures: found {jax.process_count()} processes, expected one,"
        " which has all of the encoder; use pixels"
      )
    where = None
    if self.folder is not None:
      where = pathlib.Path(self.folder) / encoder_hash(model, params)
    # The weights are copied: those of the run may be cut over many devices.
    own = jax.device_put(jax.device_get(vision), jax.local_devices()[0])
    return EncodedViews(self, model, own, where, self.megabytes << 20)


def encoder_hash(model: VisionLanguageModel, params: Params) -> str:
  """Returns the hash of everything that features depend on but the pixels."""
  made = hashlib.sha256()
  made.update(repr((model.vision, model.normalise, model.features)).encode())
  for path, x in tree.flatten_paths(params["vision"]):
    x = np.asarray(x)
    made.update(f"{path} {x.dtype} {x.shape}".encode())
    made.update(np.ascontiguousarray(x).tobytes())
  return made.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedViews:
  """Features of views by one encoder, from memory, a folder, or the encoder.

  Attributes:
    settings: it was made of.
    params: `vision` alone.
    folder: of features by this encoder, or None.
    max_bytes: bytes of features in memory.
  """

  settings: CachedFeatures
  model: VisionLanguageModel
  params: Any
  folder: pathlib.Path | None
  max_bytes: int
  memory: collections.OrderedDict[str, np.ndarray] = dataclasses.field(
    default_factory=collections.OrderedDict, repr=False
  )
  lock: Any = dataclasses.field(default_factory=threading.Lock, repr=False)

  def __call__(self, pixels: ViewPixels, used: int) -> Row:
    """Returns `features`, `[V, R, S, C]`: zeros where views are padding.

    Raises:
      UserError: views are of native resolution, each of a grid of its own, or
        their patches are pooled together.
    """
    if isinstance(pixels, Patches | GroupedViews):
      raise UserError(
        "CachedFeatures: found views of native resolution or groups of patches,"
        " expected views of one size, each on its own; use pixels"
      )
    names = [
      hashlib.sha256(view.tobytes()).hexdigest() for view in pixels[:used]
    ]
    grid = self.model.grid(*pixels.shape[1:3])
    kind = jax.eval_shape(
      self.model.view_features,
      self.params,
      jax.ShapeDtypeStruct((1, *pixels.shape[1:]), pixels.dtype),
    )
    shape = (*grid, kind.shape[-1])
    with self.lock:
      found = {x: self._known(x, shape, kind.dtype) for x in names}
      new = {
        x: view
        for x, view in zip(names, pixels, strict=False)
        if found[x] is None
      }
      found |= self._encoded(new, shape)
      for name in names:
        self._remember(name, found[name])
    features = np.zeros((len(pixels), *shape), kind.dtype)
    for i, name in enumerate(names):
      features[i] = found[name]
    return {"features": features}

  def with_encoder(
    self, model: VisionLanguageModel, params: Params, trainable: str
  ) -> "EncodedViews":
    """Returns what makes features by another encoder; itself for its own.

    Raises:
      UserError: see `CachedFeatures.with_encoder`.
    """
    made = self.settings.with_encoder(model, params, trainable)
    own = encoder_hash(self.model, self.params)
    return self if encoder_hash(model, params) == own else made

  def _encoded(
    self, views: dict[str, np.ndarray], shape: tuple[int, ...]
  ) -> dict[str, np.ndarray]:
    """Returns and writes the features of views that are not cached."""
    made, names = {}, list(views)
    for start in range(0, len(names), _CHUNK):
      part = names[start : start + _CHUNK]
      stack = np.stack([views[x] for x in part])
      stack = np.pad(stack, ((0, _CHUNK - len(part)), (0, 0), (0, 0), (0, 0)))
      found = np.asarray(_encode(self.model, self.params, jnp.asarray(stack)))
      made |= {x: y.reshape(shape) for x, y in zip(part, found, strict=False)}
    for name, x in made.items():
      self._write(name, x)
    return made

  def _known(
    self, name: str, shape: tuple[int, ...], dtype: Any
  ) -> np.ndarray | None:
    if name in self.memory:
      return self.memory[name]
    if self.folder is None:
      return None
    try:
      raw = self._file(name).read_bytes()
    except FileNotFoundError:
      return None
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    # A file that a crash cut short is made anew.
    return (
      np.frombuffer(raw, dtype).reshape(shape) if len(raw) == size else None
    )

  def _remember(self, name: str, features: np.ndarray) -> None:
    self.memory[name] = features
    self.memory.move_to_end(name)
    while len(self.memory) * features.nbytes > max(
      self.max_bytes, features.nbytes
    ):
      self.memory.popitem(last=False)

  def _write(self, name: str, features: np.ndarray) -> None:
    if self.folder is None:
      return
    file = self._file(name)
    with folders.writing(file):
      file.parent.mkdir(parents=True, exist_ok=True)
      partial = file.with_name(f"{name}.{os.getpid()}.partial")
      partial.write_bytes(features.tobytes())
      partial.replace(file)

  def _file(self, name: str) -> pathlib.Path:
    return self.folder / name[:2] / name


@jax.jit(static_argnums=0)
def _encode(
  model: VisionLanguageModel, params: Params, pixels: UInt8[Array, "B H W 3"]
) -> Float[Array, "B N C"]:
  return model.view_features(params, pixels)
