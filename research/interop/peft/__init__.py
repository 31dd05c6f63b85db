"""Adapters in PEFT's format, read and written.

Fields of adapter_config.json are in `config`, but for those of one method,
which its own file in `research/lora/methods` declares (`PEFT_DEFAULTS`,
`peft_fields`).
"""

from research.interop.peft.config import CONFIG
from research.interop.peft.read import WEIGHTS, load_adapter, open_adapter
from research.interop.peft.write import save_adapter

__all__ = [
  "CONFIG",
  "WEIGHTS",
  "load_adapter",
  "open_adapter",
  "save_adapter",
]
