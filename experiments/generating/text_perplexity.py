"""Perplexity of a text: how a model reads it, as settings that measure it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from experiments.core import cli
from research.errors import UserError
from research.io.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextPerplexity:
  """How a model reads a text.

  Attributes:
    hint_at_bos: whether to warn of a model that expects special tokens which
      `bos` leaves out.
  """

  window: int = setting(1024, "Tokens read together.")
  bos: Literal["never", "auto", "always"] = setting(
    "never",
    "Whether the model's first token stands before each window: auto where its "
    "tokenizer, or the run that trained it, says so.",
  )
  max_windows: int = setting(
    8, "How many windows at most, from the start; 0 for all."
  )
  batch: int = setting(1, "Windows computed at a time.")
  kv: str = setting(
    "", "Quantize the KV cache, e.g. k4v4, k8v4,residual=64 or int8."
  )
  chunk: int | None = setting(
    None,
    "Tokens read at a time, through a cache; 1 with --kv, else the whole "
    "window.",
  )
  hint_at_bos: bool = False

  def __post_init__(self) -> None:
    self._quantizer()

  def _quantizer(self) -> Any:
    from research.quant.kv import kv_quantizer

    return kv_quantizer.parse(self.kv)

  def measure(self, loaded: Any, text: str, name: str) -> dict[str, Any]:
    """Returns the perplexity, and with `kv` also that of an exact cache.

    Raises:
      UserError: a setting does not fit the model, or the text has one token.
    """
    from experiments.generating import diffusion

    diffusion.check_next_token(loaded, f"--model={name}")
    kv, chunk = self._quantizer(), self.chunk
    if kv is not None and chunk is None:
      chunk = 1
    ids = loaded.tokenizer.encode(text)
    begin = self._begin(loaded.tokenizer, name)
    found = self._perplexity(loaded, ids, begin, chunk, kv)
    result = {
      "perplexity": found.perplexity,
      "tokens": found.tokens,
      "tokens_per_s": found.tokens / found.seconds,
      "nll": found.nll,
      "windows": found.windows,
      "seconds": found.seconds,
      "window": self.window,
      "bos": self.bos,
    }
    if kv is None:
      return result
    without = self._perplexity(loaded, ids, begin).perplexity
    compared = {"kv": self.kv, "chunk": chunk, "perplexity_without": without}
    return result | compared | self._cache_bytes(loaded, kv)

  def _begin(self, tokenizer: Any, name: str) -> tuple[int, ...]:
    expected = tokenizer.special.row_begin
    if self.bos == "auto":
      return expected
    if self.bos == "always":
      if not expected and tokenizer.bos is None:
        raise UserError(
          f"--bos=always: the tokenizer of {name} has no bos token; expected "
          "--bos=auto or never"
        )
      return expected or (tokenizer.bos,)
    if expected and self.hint_at_bos:
      names = "".join(map(tokenizer.backend.id_to_token, expected))
      cli.warn(
        f"this model expects {names} first, and windows do not have it; "
        "--bos=auto adds it to each window, --bos=never hides this warning"
      )
    return ()

  def _perplexity(
    self,
    loaded: Any,
    ids: Sequence[int],
    begin: Sequence[int],
    chunk: int | None = None,
    kv: Any = None,
  ) -> Any:
    """Returns the perplexity, with weights laid out for the rows of a call."""
    from research import tree
    from research.generation.perplexity import perplexity
    from research.quant.kv import kv_quantizer
    from research.quant.layouts import cpu_layout

    if isinstance(kv, kv_quantizer.KVByLayer):
      kv.check_depth(len(loaded.model.layer_kinds()))
    rows = (chunk or self.window) * self.batch
    params = cpu_layout.for_reading(loaded.params, loaded.model, rows)
    if params is loaded.params and isinstance(kv, kv_quantizer.KVByLayer):
      params = tree.unroll(params)
    return perplexity(
      loaded.model,
      params,
      ids,
      window=self.window,
      max_windows=self.max_windows or None,
      batch=self.batch,
      chunk=chunk,
      kv=kv,
      begin=begin,
    )

  def _cache_bytes(self, loaded: Any, kv: Any) -> dict[str, Any]:
    """Returns what a window's keys and values take in the cache."""
    import jax

    from research import tree
    from research.quant.kv import kv_memory

    shapes = jax.eval_shape(tree.unroll, loaded.params)
    took = kv_memory.memory(loaded.model, shapes, 1, self.window, kv=kv)
    return {
      "kv_bytes_per_token": took.bytes_per_token,
      "kv_bits_per_number": took.bits_per_number,
      "kv_cache_bytes": took.cache_bytes,
    }
