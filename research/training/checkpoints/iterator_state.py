"""The data iterator's position, as an item of a checkpoint."""

import hashlib
import json
from typing import Any

import jax

from research.io.folders import Folder


class IteratorState:
  """An iterator's position as JSON, in one file for all processes."""

  def __init__(self, text: str):
    self.text = text
    self.digest = hashlib.sha256(text.encode()).hexdigest()

  async def save(self, directory: Any) -> Any:
    """Writes the state; Orbax's `StatefulCheckpointable` protocol."""

    async def write():
      folder = await directory.await_creation()
      if jax.process_index() == 0:
        (folder / "place.json").write_text(self.text)

    return write()

  async def load(self, directory: Any) -> Any:
    """Required by the protocol; use `read` instead."""
    raise NotImplementedError

  @classmethod
  def read(cls, folder: Folder) -> "IteratorState":
    """Reads what `save` wrote, or what Grain wrote in older checkpoints."""
    path = folder / "place.json"
    if not path.exists():
      path = folder / "process_0-of-1.json"
    text = path.read_text()
    json.loads(text)
    return cls(text)
