"""Exports a tokenizer to GGUF metadata, if the format can express it.

The behaviour of a `tokenizers` object can only be tested by running it. So the
keys are generated, read back as llama.cpp would, and used only if both
tokenizers agree on a set of probe texts.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import tokenizers

from research.text import gguf_tokenizer
from research.text.tokenizer import Tokenizer
from research.typing import UserError

_NORMAL, _CONTROL, _USER, _UNUSED, _BYTE = 1, 3, 4, 5, 6

PROBE_TEXTS = (
  "Hello, world! It's we'll I'VE don't",
  "  two  spaces\n\n\nand\tlines \r\n end ",
  "1 22 333 4444 55555 3.14159 x2 v10.0",
  "naïve café Straße Ångström ﬁ e\u0301 ½ ②",
  "Москва 東京都 서울 العربية हिन्दी ไทย ₿",
  "👩‍🚀🙂 ∂x→∞ \u200b\u00a0x\u3000y",
  "def f(x_1, *a): return {'k': [x ** 2]}  # !!??",
  "a-b_c/d\\e@f.com https://x.y/z?q=1&r=%20",
  "CamelCaseABC DEF'S 'twas \"quoted\" ...",
  "the the of and in to is that it for",
  " ",
  "\n",
  "",
)
"""Texts that known pre-tokenizers split differently."""


def from_tokenizer(
  tokenizer: Tokenizer, vocab: int
) -> tuple[dict[str, Any], str]:
  """Returns `(tokenizer.* keys, "")`, or `({}, reason)` if not possible.

  Args:
    tokenizer: the tokenizer to export.
    vocab: number of embedding rows; missing tokens are marked unused.
  """
  fields = json.loads(tokenizer.backend.to_str())
  model = fields["model"]
  if model.get("type") != "BPE":
    return {}, f"a {model.get('type')} tokenizer; GGUF readers support BPE"
  tokens, types = _tokens(tokenizer, fields, vocab)
  if tokens is None:
    return {}, "its tokens are not numbered from 0 without a gap"
  shared = _special(tokenizer, model, fields)
  for rest in _candidates(tokenizer, model, tokens, types):
    found = {"tokenizer.ggml.tokens": tokens, **rest, **shared}
    found.setdefault("tokenizer.ggml.token_type", np.asarray(types, np.int32))
    if _alike(tokenizer, found):
      first = {"tokenizer.ggml.model": found.pop("tokenizer.ggml.model")}
      return first | found, ""
  return {}, "no pre-tokenizer that a GGUF file can name splits texts like it"


def _tokens(tokenizer, fields, vocab):
  """Returns the token and type of each id; (None, None) if ids have gaps."""
  known = tokenizer.backend.get_vocab(with_added_tokens=True)
  size = max(vocab, len(known))
  if max(known.values(), default=0) >= size:
    return None, None
  tokens = [f"[PAD{i}]" for i in range(size)]
  types = [_UNUSED] * size
  for token, i in known.items():
    tokens[i], types[i] = token, _NORMAL
  for added in fields.get("added_tokens") or []:
    types[added["id"]] = _CONTROL if added["special"] else _USER
  return tokens, types


def _special(tokenizer: Tokenizer, model, fields) -> dict[str, Any]:
  names = dict(bos=tokenizer.bos, eos=tokenizer.eos, padding=tokenizer.pad)
  unknown = model.get("unk_token")
  if unknown is not None:
    names["unknown"] = tokenizer.backend.token_to_id(unknown)
  others = [i for i in tokenizer.stop if i != tokenizer.eos]
  # llama.cpp ends texts at those in `ENDS` where no key names them.
  ends = gguf_tokenizer.ENDS
  others.sort(key=lambda i: tokenizer.backend.id_to_token(i) in ends)
  names |= zip(("eot", "eom"), others, strict=False)
  out: dict[str, Any] = {
    f"tokenizer.ggml.{name}_token_id": i
    for name, i in names.items()
    if i is not None
  }
  around = tokenizer.own_special
  begins = tokenizer.bos is not None and tokenizer.bos in around.begin[:1]
  out["tokenizer.ggml.add_bos_token"] = begins
  if tokenizer.eos is not None and tokenizer.eos in around.end[:1]:
    out["tokenizer.ggml.add_eos_token"] = True
  if tokenizer.chat_template is not None:
    out["tokenizer.chat_template"] = tokenizer.chat_template
  return out


def _candidates(tokenizer, model, tokens, types) -> Iterator[dict[str, Any]]:
  merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
  pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
  if model.get("byte_fallback"):
    scores = _scores(tokens, pairs)
    kinds = [
      _BYTE if t == _NORMAL and _is_byte(token) else t
      for token, t in zip(tokens, types, strict=True)
    ]
    for prefix in (True, False):
      yield {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": np.asarray(scores, np.float32),
        "tokenizer.ggml.token_type": np.asarray(kinds, np.int32),
        "tokenizer.ggml.add_space_prefix": prefix,
      }
    return
  for pre in gguf_tokenizer.PRE_TOKENIZERS:
    yield {
      "tokenizer.ggml.model": "gpt2",
      "tokenizer.ggml.pre": pre,
      "tokenizer.ggml.merges": merges,
    }


def _is_byte(token: str) -> bool:
  return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(tokens, pairs) -> list[float]:
  """Returns scores that reproduce the merge order: minus the merge rank."""
  rank: dict[str, int] = {}
  for i, (left, right) in enumerate(pairs):
    rank.setdefault(left + right, i)
  return [-float(rank.get(token, len(pairs))) for token in tokens]


def _words(backend: tokenizers.Tokenizer, text: str) -> list[str]:
  """Returns the words before merging.

  Compared separately, because a small vocabulary may not show differences.
  """
  if backend.normalizer is not None:
    text = backend.normalizer.normalize_str(text)
  if backend.pre_tokenizer is None:
    return [text]
  return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def _alike(tokenizer: Tokenizer, found: dict[str, Any]) -> bool:
  try:
    backend, _ = gguf_tokenizer.tokenizer_from_gguf(found)
  except UserError:
    return False
  mine = tokenizer.backend
  if backend.model.ignore_merges != mine.model.ignore_merges:
    return False
  marked = [t.content for t in mine.get_added_tokens_decoder().values()]
  # Blanks on either side, which some tokens take in.
  texts = [*PROBE_TEXTS, "".join(f"x{t} y {t}" for t in marked)]
  return all(
    _words(backend, text) == _words(mine, text)
    and backend.encode(text, add_special_tokens=False).ids
    == mine.encode(text, add_special_tokens=False).ids
    for text in texts
  )
