"""Writes tokenizer_smollm2.json: what GGUF's tokenizers must answer.

  .venv-peers/bin/python tests/golden/make_tokenizer.py [--to FILE]

The truth is a byte-level BPE in plain Python, with the `regex` package and
llama.cpp's spelling of each regular expression, over the vocabulary that the
`gguf` package reads. For SmolLM2 it must also agree with the `tokenizers`
package set up as SmolLM2's own tokenizer.json is.
"""

import argparse
import functools
import hashlib
import json
import pathlib
import pydoc_data.topics
import sys
import unicodedata

import numpy as np
import regex
import tokenizers

GOLDEN = pathlib.Path(__file__).parent
sys.path[:0] = [str(GOLDEN), str(GOLDEN.parent / "peers")]
import make_gguf  # noqa: E402
import smollm2  # noqa: E402

FILE = GOLDEN / "tokenizer_smollm2.json"
GPT2 = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
SHORT = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
MODERN = (
  r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
  r"|\s+(?!\S)|\s+"
)
WORDS = {
  "smollm": [r"\p{N}", GPT2],
  "gpt-2": [GPT2],
  "llama-bpe": [SHORT + MODERN % r"\p{N}{1,3}"],
  "qwen2": [SHORT + MODERN % r"\p{N}"],
  "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}
EXTRA = ["1 2", "12 3", "Ġ Ġ", "' t"]
"""Merges that show where words were cut; their results join the vocabulary."""

STRINGS = [
  "",
  "Hello, world!",
  "  two  spaces   three    four ",
  "tabs\tand\r\nlines\n\n\n  indented\n",
  "12345 67 8.9e-10 ½ Ⅻ ٣٤",
  "It's we'll THEY'RE I'd 'tis",
  "café cafe\u0301 naïve Ångström",
  "日本語のテキスト 中文 한국어 ไทย",
  "🙂👩‍👩‍👧‍👦 ∂x/∂y → ∞",
  "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
  "<|im_start|> <|endoftext|><|im_end",
  "def f(x):\n    return x ** 2  # square\n",
  "\u00a0\u2003\u200b\ufeff",
  "a" * 50,
]


class Bpe:
  """Byte-level byte-pair encoding, by definition."""

  def __init__(self, tokens, merges, special, words, nfc=False, whole=False):
    self.ids = {t: i for i, t in enumerate(tokens)}
    self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(merges)}
    self.letters = make_gguf.bytes_to_letters()
    longest = sorted(special, key=len, reverse=True)
    self.special = regex.compile(
      "(" + "|".join(map(regex.escape, longest)) + ")"
    )
    self.marked, self.words = set(special), [regex.compile(w) for w in words]
    self.nfc, self.whole = nfc, whole
    self.word = functools.cache(self._word)

  def encode(self, text):
    out = []
    for piece in self.special.split(text):
      if piece in self.marked:
        out.append(self.ids[piece])
      elif piece:
        out += self._plain(piece)
    return out

  def _plain(self, text):
    if self.nfc:
      text = unicodedata.normalize("NFC", text)
    pieces = [text]
    for words in self.words:
      pieces = [w for piece in pieces for w in self._cut(words, piece)]
    return [i for piece in pieces for i in self.word(piece)]

  @staticmethod
  def _cut(words, piece):
    at = 0
    for found in words.finditer(piece):
      if found.start() > at:
        yield piece[at : found.start()]
      if found.group():
        yield found.group()
      at = found.end()
    if at < len(piece):
      yield piece[at:]

  def _word(self, word):
    parts = [self.letters[b] for b in word.encode()]
    if self.whole and "".join(parts) in self.ids:
      return [self.ids["".join(parts)]]
    while len(parts) > 1:
      pairs = list(zip(parts, parts[1:], strict=False))
      best = min(pairs, key=lambda p: self.ranks.get(p, 1 << 60))
      if best not in self.ranks:
        break
      merged, i = [], 0
      while i < len(parts):
        if tuple(parts[i : i + 2]) == best:
          merged.append(parts[i] + parts[i + 1])
          i += 2
        else:
          merged.append(parts[i])
          i += 1
      parts = merged
    return [self.ids[p] for p in parts]


def digest(ids) -> str:
  """Returns a hash of ids as little-endian int32."""
  return hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()


def real() -> dict:
  """Returns SmolLM2's ids of the strings, and a hash of every topic's."""
  tokens, merges, kinds = (
    smollm2.field(f"tokenizer.ggml.{k}")
    for k in ("tokens", "merges", "token_type")
  )
  special = [t for t, k in zip(tokens, kinds, strict=True) if k == 3]
  bpe = Bpe(tokens, merges, special, WORDS["smollm"])
  pairs = [tuple(m.split(" ")) for m in merges]
  peer = tokenizers.Tokenizer(
    tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, pairs)
  )
  pre = tokenizers.pre_tokenizers
  peer.pre_tokenizer = pre.Sequence(
    [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
  )
  peer.add_special_tokens(special)
  texts = dict(pydoc_data.topics.topics)
  for text in (*STRINGS, *texts.values()):
    if bpe.encode(text) != peer.encode(text).ids:
      raise ValueError(f"two implementations differ on {text[:60]!r}")
  pin = "".join(texts[k] for k in sorted(texts) if k in ("if", "while", "with"))
  return dict(
    strings=[dict(text=s, ids=bpe.encode(s)) for s in STRINGS],
    topics=dict(
      text=pin, count=len(bpe.encode(pin)), sha=digest(bpe.encode(pin))
    ),
  )


def tiny() -> dict:
  """Returns ids of the strings under each pre-tokenizer, tiny vocabulary."""
  tokens = make_gguf.vocabulary() + [m.replace(" ", "") for m in EXTRA]
  special = make_gguf.SPECIAL
  out = {}
  for pre, words in WORDS.items():
    whole, nfc = pre == "llama-bpe", pre == "qwen2"
    bpe = Bpe(tokens, make_gguf.MERGES + EXTRA, special, words, nfc, whole)
    out[pre] = [bpe.encode(s) for s in STRINGS]
  return out


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--to", type=pathlib.Path, default=FILE)
  to = parser.parse_args().to
  found = dict(smollm2=real(), pre=tiny(), extra=EXTRA)
  to.write_text(json.dumps(found, indent=1) + "\n")
  for pre, rows in found["pre"].items():
    print(pre, sum(map(len, rows)))


if __name__ == "__main__":
  main()
