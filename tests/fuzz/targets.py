"""What is attacked: a file, how it is damaged, and what reads it.

A reader returns normally or raises UserError. Where it returns, `check` says
whether all of the file was meant: nothing may be loaded in part, silently.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.core import config as gin_config
from research import tree, weights
from research.data.sources import jsonl
from research.interop import load, parts, peft
from research.interop.gguf import imatrix
from research.interop.gguf.read import load_gguf
from research.interop.hf import config as hf_config
from research.interop.loaded import NOTE, Loaded
from research.io import safetensors
from research.nn import presets
from research.text import chat
from research.text.tokenizer import Tokenizer
from tests import support_gguf
from tests.fuzz import mutations

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests" / "golden" / "models"


@dataclasses.dataclass(frozen=True)
class Target:
  """One kind of file.

  Attributes:
    share: how many of a hundred cases.
    source: the good file, or the directory that it lies in.
    file: which file in there is damaged.
    mutate: (random, bytes) -> bytes.
    run: reads the file or directory, and checks what it read.
  """

  share: int
  source: Callable[[], pathlib.Path]
  file: str
  mutate: Callable[[Any, bytes], bytes]
  run: Callable[[pathlib.Path], None]


def _read_tensors(path: pathlib.Path) -> None:
  file = path / "model.safetensors"
  found = safetensors.open_file(file)
  total = sum(t.read().nbytes for t in found.values())
  header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
  assert header + total == file.stat().st_size, "bytes that no tensor has"


def _complete(it: Loaded) -> None:
  """Raises unless every parameter of the model is there, and no other."""
  want = sum(int(np.prod(slot.shape)) for slot in parts.slots(it.model))
  leaves = jax.tree.leaves(it.params, is_leaf=weights.is_weight)
  assert sum(int(np.prod(w.shape)) for w in leaves) == want, "a partial load"


def _load(path: pathlib.Path) -> None:
  _complete(load.load_model(path))


def _gguf(path: pathlib.Path) -> None:
  it = load_gguf(path / "model.gguf", packed=True)
  _complete(it)
  if it.tokenizer is not None:
    it.tokenizer.decode(it.tokenizer.encode("the rain in é", add_special=True))


def _gguf_kinds(path: pathlib.Path) -> None:
  for packed in (True, False):
    _complete(load_gguf(path / "model.gguf", packed=packed))


def _imatrix(path: pathlib.Path) -> None:
  means = imatrix.read(path / "imatrix.gguf").means()
  assert all(np.isfinite(x).all() for x in means.values())


@functools.cache
def _base() -> Loaded:
  return load.load_model(MODELS / "llama")


def _adapter(path: pathlib.Path) -> None:
  base = _base()
  params, model = peft.open_adapter(path, base.params, base.model)
  held = safetensors.open_file(path / peft.WEIGHTS)
  adapters = tree.count(params) - tree.count(base.params)
  grown = model.vocab_size - base.model.vocab_size
  whole = sum(
    int(np.prod(t.shape)) for k, t in held.items() if "lora_" not in k
  )
  inside = sum(int(np.prod(t.shape)) for t in held.values()) - whole
  assert grown or adapters == inside, "a partial load"


def _config(path: pathlib.Path) -> None:
  found = safetensors.read_json(path / "config.json")
  model = presets.transformer(*hf_config.sizes_from_config(found))
  assert len(model.layer_kinds()) == model.stack.depth


def _tokenizer(path: pathlib.Path) -> None:
  tokenizer = Tokenizer.from_directory(path)
  ids = tokenizer.encode("the rain in é 12", add_special=True)
  tokenizer.decode(ids)


def _jsonl(path: pathlib.Path) -> None:
  file = path / "data.jsonl"
  records = list(jsonl.read([str(file)]))
  lines = [x for x in file.read_bytes().split(b"\n") if x.strip()]
  assert len(records) == len(lines), "lines that no record is of"


def _gin(path: pathlib.Path) -> None:
  try:
    text = (path / "run.gin").read_text("utf-8")
  except UnicodeDecodeError:
    text = (path / "run.gin").read_bytes().decode("latin-1")
  gin_config.parse(text, name="run.gin")


def _template(path: pathlib.Path) -> None:
  text = chat.find(path, {})
  out = chat.render(
    text or "", [{"role": "user", "content": "hello"}], True, {}
  )
  assert len(out) <= 1 << 22, "more text than the bound"
  for secret in ("<class", "<module", "<function", "root:", "PATH"):
    assert secret not in out, "an escape"


def _golden(name: str) -> Callable[[], pathlib.Path]:
  return lambda: MODELS / name


@functools.cache
def _made(kind: str) -> pathlib.Path:
  """Returns a directory of good files that no golden folder has."""
  import tempfile

  from research.interop import convert, sources

  folder = pathlib.Path(tempfile.mkdtemp(prefix="heptad-fuzz-"))
  if kind == "tokenizer":
    source = sources.open_source(MODELS / "gguf_f32" / "model.gguf")
    convert.to_hf(source, folder)
  if kind == "gguf":
    support_gguf.write(folder / "model.gguf")
    squares = {f"blk.{i}.ffn_up.weight": np.full(64, i, "f4") for i in (0, 1)}
    found = imatrix.Importances(squares, dict.fromkeys(squares, 8.0))
    imatrix.write(folder / "imatrix.gguf", found)
  if kind == "ours":
    convert.to_orbax(sources.open_source(MODELS / "llama"), folder)
  if kind == "jsonl":
    rows = [
      {
        "messages": [
          {"role": "user", "content": f"question {i} é"},
          {"role": "assistant", "content": f"answer {i}"},
        ]
      }
      for i in range(5)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "data.jsonl").write_text(text)
  if kind == "gin":
    shutil.copy(
      ROOT / "configs" / "runs" / "quickstart.gin", folder / "run.gin"
    )
  if kind == "template":
    source = sources.open_source(MODELS / "gguf_f32" / "model.gguf")
    (folder / "chat_template.jinja").write_text(source.tokenizer.chat_template)
  return folder


def _bytes_of(name: str, *others: str):
  """Damages bytes, with pieces of other good files."""

  def mutate(r, data):
    other = (MODELS / r.choice(others)).read_bytes() if others else b""
    return mutations.of_bytes(r, data, other)

  return mutate


def _quantized(name: str) -> Callable[[], pathlib.Path]:
  return lambda: MODELS.with_name("quantized") / name


def _array_file() -> str:
  """Returns the file of a checkpoint that has most of its arrays."""
  folder = _quantized("ours")()
  files = folder.glob("arrays/frozen/state/ocdbt.process_0/d/*")
  most = max(files, key=lambda file: file.stat().st_size)
  return str(most.relative_to(folder))


def _tensors(r, data):
  if r.random() < 0.5:
    return mutations.of_header(r, data)
  other = (MODELS / "smollm2" / "model.safetensors").read_bytes()
  return mutations.of_bytes(r, data, other)


_GGUF_MUTATION = _bytes_of(
  "gguf", "gguf_q8_0/model.gguf", "gguf_f16/model.gguf"
)
_FILE = "model.safetensors"
_STATE = "arrays/frozen/state"
_QUANTIZED = (
  *("gptq", "awq", "bnb", "int8", "compressed"),
  *("fp8", "nvfp4", "mxfp4"),
)
"""Directories of `make_quantized` that other tools have."""

TARGETS: dict[str, Target] = {
  "safetensors": Target(20, _golden("llama"), _FILE, _tensors, _read_tensors),
  "model": Target(4, _golden("llama"), _FILE, _tensors, _load),
  "index": Target(
    2,
    _golden("qwen2"),
    safetensors.INDEX,
    mutations.of_json,
    _load,
  ),
  "gguf": Target(20, _golden("gguf_q4_1"), "model.gguf", _GGUF_MUTATION, _gguf),
  "gguf_mixed": Target(
    4, _golden("gguf_mixed"), "model.gguf", _GGUF_MUTATION, _gguf
  ),
  "gguf_kinds": Target(
    3, lambda: _made("gguf"), "model.gguf", _GGUF_MUTATION, _gguf_kinds
  ),
  "imatrix": Target(
    2, lambda: _made("gguf"), "imatrix.gguf", _GGUF_MUTATION, _imatrix
  ),
  "adapter_config": Target(
    9,
    _golden("peft_patterns"),
    "adapter_config.json",
    mutations.of_json,
    _adapter,
  ),
  "adapter": Target(
    5, _golden("peftfull_saved_embed"), peft.WEIGHTS, _tensors, _adapter
  ),
  "config": Target(
    8, _golden("gemma3"), "config.json", mutations.of_json, _config
  ),
  "config_model": Target(
    3, _golden("llama_yarn"), "config.json", mutations.of_json, _load
  ),
  "tokenizer": Target(
    8,
    lambda: _made("tokenizer"),
    "tokenizer.json",
    mutations.of_json,
    _tokenizer,
  ),
  "tokenizer_config": Target(
    2,
    lambda: _made("tokenizer"),
    "tokenizer_config.json",
    mutations.of_json,
    _tokenizer,
  ),
  "checkpoint": Target(
    1, lambda: _made("ours"), NOTE, mutations.of_json, _load
  ),
  **{
    name: Target(1, _quantized(name), _FILE, _tensors, _load)
    for name in _QUANTIZED
  },
  **{
    f"{name}_config": Target(
      1, _quantized(name), "config.json", mutations.of_json, _load
    )
    for name in _QUANTIZED
  },
  "packed_note": Target(1, _quantized("ours"), NOTE, mutations.of_json, _load),
  "packed_arrays": Target(
    1, _quantized("ours"), _array_file(), mutations.of_bytes, _load
  ),
  "packed_manifest": Target(
    1,
    _quantized("ours"),
    f"{_STATE}/manifest.ocdbt",
    mutations.of_bytes,
    _load,
  ),
  "packed_metadata": Target(
    1, _quantized("ours"), f"{_STATE}/_METADATA", mutations.of_json, _load
  ),
  "packed_sums": Target(
    1, _quantized("ours"), "arrays/base.json", mutations.of_json, _load
  ),
  "jsonl": Target(
    6, lambda: _made("jsonl"), "data.jsonl", mutations.of_lines, _jsonl
  ),
  "gin": Target(3, lambda: _made("gin"), "run.gin", mutations.of_gin, _gin),
  "template": Target(
    5,
    lambda: _made("template"),
    "chat_template.jinja",
    mutations.of_template,
    _template,
  ),
}
