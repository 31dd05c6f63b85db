"""Fields of JSON files with values of other types: read, or one clear error.

Where `test_fuzz` draws cases, this goes through every field of a model's, a
quantized model's and an adapter's files, with a value of each JSON type.
"""

import json
import pathlib
import shutil

import pytest

from research.interop import load
from research.io import unread
from research.typing import UserError
from tests.fuzz import targets

FIRST = ([1, 2],)
"""What ends in a TypeError where a name is looked up."""
OTHERS = ({"a": [1]}, None, True, 3, -1.5, "a", [], {}, [{}], [["a"]])

GOLDEN = targets.MODELS
QUANTIZED = GOLDEN.with_name("quantized")

CASES = {  # name -> directory, file
  "gemma3": (GOLDEN / "gemma3", "config.json"),
  "qwen3_moe": (GOLDEN / "qwen3_moe", "config.json"),
  "yarn": (GOLDEN / "llama_yarn", "config.json"),
  **{
    name: (QUANTIZED / name, "config.json")
    for name in ("gptq", "awq", "bnb", "int8", "compressed", "nvfp4")
  },
  "generation": (GOLDEN / "llama", "generation_config.json"),
  "tokenizer": ("tokenizer", "tokenizer_config.json"),
  "adapter": (GOLDEN / "peft_patterns", "adapter_config.json"),
}
GENERATION = dict(
  bos_token_id=1, eos_token_id=[2], pad_token_id=0, temperature=0.7, top_p=0.9
)


def replaced(value, others):
  """Yields `value` with one field, of any depth but within lists, replaced."""
  for key, x in value.items():
    for other in others:
      yield f"{key}: {other!r}", value | {key: other}
    if isinstance(x, dict):
      for where, changed in replaced(x, others):
        yield f"{key}.{where}", value | {key: changed}


def attempt(directory: pathlib.Path, name: str) -> None:
  """Reads what is damaged, as a model's loader or an adapter's does."""
  if name == "tokenizer":
    targets._tokenizer(directory)
  elif name == "adapter":
    targets._adapter(directory)
  else:
    load.load_model(directory, packed="any", shardings=unread.unplaced)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
  "others", [FIRST, pytest.param(OTHERS, marks=pytest.mark.slow)]
)
def test_fields_of_other_types_are_read_or_refused(name, others, tmp_path):
  source, file = CASES[name]
  source = targets._made(source) if isinstance(source, str) else source
  copy = tmp_path / "copy"
  shutil.copytree(source, copy)
  path = copy / file
  value = GENERATION if name == "generation" else json.loads(path.read_text())
  failed = []
  for where, changed in replaced(value, others):
    path.write_text(json.dumps(changed))
    try:
      attempt(copy, name)
    except UserError:
      pass
    except Exception as e:  # noqa: BLE001
      failed.append(f"{where}: {type(e).__name__}: {e}"[:200])
  assert not failed, "\n".join(failed)
