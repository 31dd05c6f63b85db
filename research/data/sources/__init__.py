"""Data sources, one per file."""

from research.data.sources.sources import (
  Documents,
  PydocTopics,
  Split,
  TextFiles,
  read_text,
  split_of,
)

__all__ = [
  "Documents",
  "PydocTopics",
  "Split",
  "TextFiles",
  "read_text",
  "split_of",
]
