"""What a base calls its modules in the code that PEFT is to find them in.

Most models are in transformers, under the names of `research.interop.hf.names`.
LLaDA's own code (8B, 1.5) has OLMo's: `model.transformer.blocks.0.q_proj`,
`.ff_proj` for the gate, `.ff_out`, which is the head's name, too, so that a
target `ff_out` means both. LLaDA 2's has queries, keys and values as one
module, in which ours are parts: an adapter on one of them has no name.
LLaDA-MoE's and Dream's code has the usual names.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from research.interop.hf import llada, llada2
from research.io import safetensors
from research.typing import UserError

FUSED = "query_key_value"
"""LLaDA 2's module of three; `<it>[q]` is what a part of it is called here."""


def _same(name: str) -> str:
  return name


def _llada(name: str) -> str:
  return next(iter(llada.as_lladas({name: None})))


def _llada2(name: str) -> str:
  for theirs, ours in llada2.MODULES.items():
    name = name.replace(f".{ours}.", f".{theirs}.")
  for part in "qkv":
    fused = f".attention.{FUSED}[{part}]."
    name = name.replace(f".self_attn.{part}_proj.", fused)
  return name.replace("model.embed_tokens.", "model.word_embeddings.")


@dataclasses.dataclass(frozen=True)
class Naming:
  """Names of modules.

  Attributes:
    embedding, head: of those two.
    theirs: the usual name of a tensor -> theirs.
  """

  embedding: str = "model.embed_tokens"
  head: str = "lm_head"
  theirs: Callable[[str], str] = _same


USUAL = Naming()
LLADA = Naming("model.transformer.wte", "model.transformer.ff_out", _llada)
LLADA2 = Naming("model.word_embeddings", "lm_head", _llada2)

EMBEDDINGS = {n.embedding for n in (USUAL, LLADA, LLADA2)}
"""Modules whose adapters are those of embeddings."""


def of_config(config: Mapping[str, Any] | None) -> Naming:
  """Returns the names of the model that a config.json describes."""
  kind = config.get("model_type") if config else None
  if kind == llada2.KIND:
    return LLADA2
  if kind in llada.KINDS and not llada.is_mixture(config or {}):
    return LLADA
  return USUAL


def of_source(source: Mapping[str, Any]) -> Naming:
  """Returns the names of a loaded model, given where it came from."""
  config, path = source.get("config"), source.get("path")
  if config is None and path is not None:
    file = pathlib.Path(path) / "config.json"
    config = safetensors.read_json(file) if file.is_file() else None
  return of_config(config)


def of_keys(keys: Iterable[str]) -> Naming:
  """Returns the names that an adapter's file has, in doubt the usual ones."""
  found = list(keys)
  if any(".model.transformer." in key for key in found):
    return LLADA
  if any(".attention.dense." in key or FUSED in key for key in found):
    return LLADA2
  return USUAL


def check(modules: Iterable[str], where: Any) -> None:
  """Raises UserError for an adapter on what is a part of a module."""
  parts = sorted(m for m in modules if FUSED in m)
  if parts:
    raise UserError(
      f"{where}: {parts[0]}: LLaDA 2 keeps queries, keys and values in one"
      " module, so an adapter on one of them has no name; expected adapters on"
      " others (attention/o, dense layers), or merge it into the model"
    )
