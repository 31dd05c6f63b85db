"""Data sources, one per file."""

from research.data.sources.sources import (
  Documents,
  NoExamples,
  Paths,
  PydocTopics,
  Split,
  TextFiles,
  expand,
  read_text,
  split_of,
)

__all__ = [
  "Documents",
  "NoExamples",
  "Paths",
  "PydocTopics",
  "Split",
  "TextFiles",
  "expand",
  "read_text",
  "split_of",
]
