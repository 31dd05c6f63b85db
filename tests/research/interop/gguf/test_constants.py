"""Numbers and keys of the format are those of the package `gguf`.

They are written out in our code, not imported: the package would bring
`requests` and what that needs, for constants alone. `make_gguf_names.py` wrote
down what it has; `tests/peers/test_goldens.py` asks the one that is installed.
"""

import ast
import json
import pathlib
import re

import numpy as np

from research.interop.gguf import container, recipe, tensor_types
from research.text import gguf_vocab

ROOT = pathlib.Path(__file__).parents[4]
TABLE = json.loads((ROOT / "tests/golden/gguf_names.json").read_text("utf-8"))


def test_types_have_its_numbers_and_sizes():
  found = {
    t.name: [t.id, t.block, t.nbytes] for t in tensor_types.TYPES.values()
  }
  want = {name: TABLE["types"][name] for name in found}
  # There it still has two float32; ggml-common.h: sizeof(block_q8_1) ==
  # 2 * sizeof(ggml_half) + QK8_1.
  assert want.pop("Q8_1") == [9, 32, 40] and found.pop("Q8_1") == [9, 32, 36]
  assert found == want
  assert set(TABLE["types"]) - set(tensor_types.TYPES) == {"Q1_0"}


def test_types_of_metadata_have_its_numbers():
  words = {"u": "UINT", "i": "INT", "f": "FLOAT", "b": "BOOL"}
  found = {"STRING": container._STRING, "ARRAY": container._ARRAY}
  for number, dtype in container._SCALARS.items():
    of = np.dtype(dtype)
    bits = "" if of.kind == "b" else 8 * of.itemsize
    found[f"{words[of.kind]}{bits}"] = number
  assert found == TABLE["values"]


def test_kinds_of_files_have_its_numbers():
  renamed = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}
  renamed |= {f"Q{n}_K": f"MOSTLY_Q{n}_K_S" for n in (3, 4, 5)}
  for name, number in recipe.FILE_TYPES.items():
    theirs = renamed.get(name, f"MOSTLY_{name}")
    assert number == TABLE["files"][theirs], name


def test_kinds_of_tokens_have_its_numbers():
  names = "NORMAL", "CONTROL", "USER", "UNUSED", "BYTE"
  renamed = {"USER": "USER_DEFINED"}
  for name in names:
    number = getattr(gguf_vocab, f"_{name}")
    assert number == TABLE["tokens"][renamed.get(name, name)], name


def test_keys_are_those_of_the_package():
  known = {key.removeprefix("{arch}.") for key in TABLE["every_key"]}
  groups = "general|tokenizer|adapter|imatrix|attention|rope|split"
  key = re.compile(rf"(?:llama\.)?((?:{groups})(?:\.[a-z0-9_]+)+)")
  files = [
    *(ROOT / "research/interop/gguf").glob("*.py"),
    *(ROOT / "research/text").glob("gguf_*.py"),
    *(ROOT / "research/interop/peft").glob("gguf_*.py"),
  ]
  found = {
    match[1]
    for file in files
    for node in ast.walk(ast.parse(file.read_text("utf-8")))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
    if (match := key.fullmatch(node.value))
  }
  assert found <= known, found - known
  assert len(found) > 30
