"""Data sources, one per file."""

from research.data.sources.sources import (
  Documents,
  FromFiles,
  NoExamples,
  Paths,
  PydocTopics,
  Split,
  TextFiles,
  convert_hint,
  expand,
  files_sha256,
  is_stream,
  read_text,
  split_of,
)

__all__ = [
  "Documents",
  "FromFiles",
  "NoExamples",
  "Paths",
  "PydocTopics",
  "Split",
  "TextFiles",
  "convert_hint",
  "expand",
  "files_sha256",
  "is_stream",
  "read_text",
  "split_of",
]
