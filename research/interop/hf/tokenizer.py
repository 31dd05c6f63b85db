"""A tokenizer's files in a Hugging Face directory, copied or made anew."""

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from research.io import safetensors
from research.text.tokenizer import Tokenizer

FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "tokenizer.model",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
  "chat_template.json",
)
GENERATION = "generation_config.json"


def write(
  directory: pathlib.Path,
  source: pathlib.Path | None,
  tokenizer: Tokenizer | None,
) -> list[str]:
  """Writes the tokenizer's files and the generation config; returns names.

  Args:
    source: a directory whose files are copied as they are, or None.
    tokenizer: whose files are written where there are none to be copied.
  """
  if source is not None:
    found = [n for n in (*FILES, GENERATION) if (source / n).is_file()]
    for name in found:
      shutil.copyfile(source / name, directory / name)
    if "tokenizer.json" in found or tokenizer is None:
      return found
  if tokenizer is None:
    return []
  made = files(tokenizer)
  for name, value in made.items():
    safetensors.write_json(directory / name, value)
  return list(made)


def files(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
  """Returns the JSON files that a tokenizer of any origin is read from."""
  backend = tokenizer.backend
  ids = dict(bos=tokenizer.bos, eos=tokenizer.eos, pad=tokenizer.pad)
  tokens = {
    f"{name}_token": backend.id_to_token(i)
    for name, i in ids.items()
    if i is not None
  }
  whole = safetensors.read_json("tokenizer.json", backend.to_str().encode())
  around = tokenizer.own_special
  if (tokenizer.add_bos or tokenizer.add_eos) and (around.begin or around.end):
    whole["post_processor"] = _around(backend, around.begin, around.end)
  config = dict(tokenizer_class="PreTrainedTokenizerFast", **tokens)
  config |= dict(clean_up_tokenization_spaces=False)
  if tokenizer.chat_template is not None:
    config["chat_template"] = tokenizer.chat_template
  generation: dict[str, Any] = {
    f"{name}_token_id": i for name, i in ids.items() if i is not None
  }
  # A GGUF file may end texts without naming a token that ends them.
  if tokenizer.stop not in ((), (tokenizer.eos,)):
    generation["eos_token_id"] = list(tokenizer.stop)
  return {
    "tokenizer.json": whole,
    "tokenizer_config.json": config,
    GENERATION: generation,
  }


def _around(
  backend: Any, begin: Sequence[int], end: Sequence[int]
) -> dict[str, Any]:
  """Returns the post-processor that puts tokens around a text."""
  names = {i: backend.id_to_token(i) for i in (*begin, *end)}

  def special(ids: Sequence[int], part: int) -> list[dict[str, Any]]:
    return [dict(SpecialToken=dict(id=names[i], type_id=part)) for i in ids]

  def text(part: int) -> list[dict[str, Any]]:
    inside = dict(Sequence=dict(id="AB"[part], type_id=part))
    return [*special(begin, part), inside, *special(end, part)]

  return dict(
    type="TemplateProcessing",
    single=text(0),
    pair=[*text(0), *text(1)],
    special_tokens={
      name: dict(id=name, ids=[i], tokens=[name]) for i, name in names.items()
    },
  )
