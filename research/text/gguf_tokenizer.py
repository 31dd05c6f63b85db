"""Reads the tokenizer of a GGUF file as a `tokenizers.Tokenizer`.

Supports two tokenizer models: byte-level BPE ("gpt2"), where
`tokenizer.ggml.pre` names the pre-tokenizer regular expression, and
SentencePiece ("llama"), where merges are derived from the scores.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from research.typing import UserError

_GPT2 = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
  r"|\s+(?!\S)|\s+"
)
_CL100K = (  # cl100k's, with runs of up to {digits} digits
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
  r"|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (_CL100K.format(digits="{1,3}"),)
_QWEN2 = (_CL100K.format(digits=""),)
_DIGITS = (r"\p{N}", _GPT2)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
  "default": _DEFAULT,
  "gpt-2": (_GPT2,),
  "smollm": _DIGITS,
  "starcoder": _DIGITS,
  "llama-bpe": _LLAMA3,
  "llama-v3": _LLAMA3,
  "llama3": _LLAMA3,
  "qwen2": _QWEN2,
  "deepseek-r1-qwen": _QWEN2,
}
"""Regular expressions that split text into words, applied in order, for each
value of `tokenizer.ggml.pre`."""

_WHOLE_WORDS = ("llama-bpe", "llama-v3", "llama3")
"""Pre-tokenizers whose words become one token without merges if they can."""

_UNKNOWN, _CONTROL, _USER, _BYTE = 2, 3, 4, 6
_LONGEST = 512
"""Maximum length of a SentencePiece token, all splits of which are tried."""

_SPACE = "\u2581"

ENDS = (
  *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>"),
  *("<|flush|>", "<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>"),
  *("<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
  *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>"),
  *("<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
)
"""Tokens at which llama.cpp ends generation, whatever else a file names."""

_NO_ENDS = (
  ("<|end|>", ("<|return|>", "<|call|>")),
  ("<|end|>", ("<|return|>", "<|calls|>")),
  ("<|end|>", ("<|call|>", "<|flush|>")),
  ("<|end|>", ("<|calls|>", "<|flush|>")),
  ("</s>", ("<|tool_response>",)),
)
"""Tokens of `ENDS` that end nothing in a vocabulary that has all the others."""


class _Fields:
  """Validated access to the `tokenizer.ggml.*` keys."""

  def __init__(self, metadata: Mapping[str, Any]):
    self.metadata = metadata

  def fail(self, key: str, found: Any, expected: str) -> NoReturn:
    raise UserError(
      f"tokenizer.ggml.{key}: found {str(found)[:60]!r}, expected {expected}"
    )

  def get(self, key: str, kind: type, default: Any) -> Any:
    value = self.metadata.get(f"tokenizer.ggml.{key}", default)
    if value is not default and type(value) is not kind:
      self.fail(key, value, f"a value of type {kind.__name__}")
    return value

  def strings(self, key: str) -> list[str]:
    value = self.get(key, list, None)
    if not value:
      self.fail(key, value, "a list of strings")
    return value

  def numbers(self, key: str, count: int, default: float | int) -> list:
    value = self.metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
      return [default] * count
    if not isinstance(value, np.ndarray) or value.shape != (count,):
      self.fail(key, type(value).__name__, f"{count} numbers, one per token")
    return value.tolist()

  def bpe(self, **parts: Any) -> tokenizers.Tokenizer:
    """Returns a bare BPE tokenizer; fails if its parts are inconsistent."""
    try:
      return tokenizers.Tokenizer(models.BPE(**parts))
    except Exception as error:  # the Rust library raises no narrower type
      self.fail("merges", error, "pairs of tokens that join to a token")

  def token(self, key: str, count: int) -> int | None:
    value = self.get(key, int, None)
    if value is not None and not 0 <= value < count:
      self.fail(key, value, f"a token below {count}")
    return value


def tokenizer_from_gguf(
  metadata: Mapping[str, Any],
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
  """Returns the tokenizer of a GGUF file and its special tokens.

  Args:
    metadata: metadata of the file.

  Returns:
    The tokenizer, which adds no special tokens by itself, and a dict with
    `bos`, `eos`, `eot`, `eom`, `unk`, `pad` (ids or None), `stop` (ids, as
    llama.cpp has them but for those of infilling), `add_bos`, `add_eos` (bool)
    and `chat_template` (text or None).

  Raises:
    UserError: a key is missing, malformed, or has an unsupported value.
  """
  fields = _Fields(metadata)
  kind = fields.get("model", str, None)
  builders = {"gpt2": _byte_level, "llama": _sentencepiece}
  if kind not in builders:
    fields.fail("model", kind, f"one of {', '.join(builders)}")
  tokens = fields.strings("tokens")
  types = fields.numbers("token_type", len(tokens), 1)
  if kind == "llama":
    fields = _Fields(_default_ids(types) | dict(metadata))
  unknown = fields.token("unknown_token_id", len(tokens))
  out = builders[kind](fields, tokens, unknown)
  _add_special(out, tokens, types)
  pre = fields.get("pre", str, "default")
  template = metadata.get("tokenizer.chat_template")
  special = {
    name: fields.token(f"{key}_token_id", len(tokens))
    for name, key in dict(
      bos="bos",
      eos="eos",
      eot="eot",
      eom="eom",
      unk="unknown",
      pad="padding",
    ).items()
  }
  special["stop"] = _stop(tokens, [special[x] for x in ("eos", "eot", "eom")])
  first = kind == "llama" or pre in _WHOLE_WORDS
  special["add_bos"] = fields.get("add_bos_token", bool, first)
  special["add_eos"] = fields.get("add_eos_token", bool, False)
  special["chat_template"] = template if isinstance(template, str) else None
  return out, special


def _stop(
  tokens: Sequence[str], named: Sequence[int | None]
) -> tuple[int, ...]:
  """Returns the ids that end generation, those that the file names first."""
  ids = [i for i in named if i is not None]
  ids += [i for i, token in enumerate(tokens) if token in ENDS]
  found = {tokens[i] for i in ids}
  none = {token for token, others in _NO_ENDS if found.issuperset(others)}
  return tuple(i for i in dict.fromkeys(ids) if tokens[i] not in none)


def _default_ids(types: Sequence[int]) -> dict[str, int]:
  """Returns llama.cpp's ids of special tokens that a file does not name.

  Of SentencePiece; none where a token of that id is no special one.
  """
  known = {"unknown": (0, _UNKNOWN), "bos": (1, _CONTROL), "eos": (2, _CONTROL)}
  return {
    f"tokenizer.ggml.{name}_token_id": i
    for name, (i, kind) in known.items()
    if i < len(types) and types[i] == kind
  }


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
  """Returns token -> id; of duplicate tokens, the first one is used."""
  return {t: len(tokens) - 1 - i for i, t in enumerate(reversed(tokens))}


def _byte_level(
  fields: _Fields, tokens: list[str], unknown: int | None
) -> tokenizers.Tokenizer:
  pre = fields.get("pre", str, "default")
  if pre not in PRE_TOKENIZERS:
    fields.fail("pre", pre, f"one of {', '.join(PRE_TOKENIZERS)}")
  merges = [tuple(m.split(" ")) for m in fields.strings("merges")]
  if bad := [m for m in merges if len(m) != 2]:
    fields.fail("merges", " ".join(bad[0]), "two tokens and a space")
  out = fields.bpe(
    vocab=_vocabulary(tokens),
    merges=merges,
    ignore_merges=pre in _WHOLE_WORDS,
  )
  if PRE_TOKENIZERS[pre] is _QWEN2:
    out.normalizer = normalizers.NFC()
  out.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
      for words in PRE_TOKENIZERS[pre]
    ]
    + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
  )
  out.decoder = decoders.ByteLevel()
  return out


def _merges(
  vocabulary: Mapping[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
  """Returns all pairs of tokens that form a token, by descending score."""
  found = []
  for token, index in vocabulary.items():
    for cut in range(1, len(token)):
      left, right = token[:cut], token[cut:]
      if left in vocabulary and right in vocabulary:
        found.append((-scores[index], -cut, left, right))
  found.sort(key=lambda entry: entry[:2])
  return [(left, right) for _, _, left, right in found]


def _sentencepiece(
  fields: _Fields, tokens: list[str], unknown: int | None
) -> tokenizers.Tokenizer:
  """Builds SentencePiece BPE, with byte fallback for unknown characters."""
  if longest := next((t for t in tokens if len(t) > _LONGEST), None):
    fields.fail("tokens", longest, f"tokens of up to {_LONGEST} characters")
  vocabulary = _vocabulary(tokens)
  types = fields.numbers("token_type", len(tokens), 1)
  scores = fields.numbers("scores", len(tokens), 0.0)
  joined = {
    t: i for t, i in vocabulary.items() if types[i] not in (_CONTROL, _BYTE)
  }
  out = fields.bpe(
    vocab=vocabulary,
    merges=_merges(joined, scores),
    unk_token=None if unknown is None else tokens[unknown],
    fuse_unk=True,
    byte_fallback=_BYTE in types,
  )
  prefix = fields.get("add_space_prefix", bool, True)
  spaces = normalizers.Replace(" ", _SPACE)
  out.normalizer = spaces
  if prefix:
    out.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
  steps = [
    decoders.Replace(_SPACE, " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
  ]
  if prefix:
    steps.append(decoders.Strip(" ", 1, 0))
  out.decoder = decoders.Sequence(steps)
  return out


def _add_special(
  out: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]
) -> None:
  """Adds the tokens that are matched in text before pre-tokenization."""
  marked = [
    tokenizers.AddedToken(token, special=kind != _USER, normalized=False)
    for token, kind in zip(tokens, types, strict=True)
    if kind in (_UNKNOWN, _CONTROL, _USER) and token
  ]
  out.add_tokens(marked)
