"""Where a run stands in its data, as a part of a checkpoint."""

import hashlib
import json
from typing import Any

import jax

from research.io.folders import Folder


class IteratorState:
  """Where an iterator stood, as JSON: one file, whatever the processes."""

  def __init__(self, text: str):
    self.text = text
    self.digest = hashlib.sha256(text.encode()).hexdigest()

  async def save(self, directory: Any) -> Any:
    """Writes it, by Orbax's protocol of a `StatefulCheckpointable`."""

    async def write():
      folder = await directory.await_creation()
      if jax.process_index() == 0:
        (folder / "place.json").write_text(self.text)

    return write()

  async def load(self, directory: Any) -> Any:
    """Part of the protocol; `read` is used instead."""
    raise NotImplementedError

  @classmethod
  def read(cls, folder: Folder) -> "Place":
    """Returns what `save` wrote, or Grain itself in earlier versions."""
    path = folder / "place.json"
    if not path.exists():
      path = folder / "process_0-of-1.json"
    text = path.read_text()
    json.loads(text)
    return cls(text)
