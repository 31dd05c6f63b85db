"""Texts as tokens, by every rule for words that we know: llama.cpp and we.

Vocabularies are learned from texts that nothing cut: what a rule cuts is what
their tokens do not join. Qwen's own tokenizer composes characters first (NFC),
and ours does; llama.cpp does not, and is given composed texts.
"""

import json
import pydoc_data.topics
import unicodedata

import gguf
import llama
import numpy as np
import pytest
import tokenizers

WORDS = (
  *("default", "gpt-2", "smollm", "starcoder", "llama-bpe", "llama-v3"),
  *("llama3", "qwen2", "deepseek-r1-qwen"),
)
COMPOSED = ("qwen2", "deepseek-r1-qwen")
PREFIX = ("with a space", "without a space")
PIECES = {  # what random texts are made of
  "letters": "abtheinrsouTHEDMéßñжяあ東京가العहि",
  "numbers": "0123456789½②٣",
  "spaces": "    \n\r\t\u00a0\u3000\u200b",
  "others": ".,!?'-_/\\\"()[]{}<>=+*&%$#@^~|`:;→∞🙂\u0301",
  "endings": [
    "'s",
    "'S",
    "'ll",
    "'LL",
    "'t",
    "n't",
    "'Ve",
    "...",
    "\r\n",
    "  ",
  ],
}
SPECIAL = ["<unk>", "<s>", "</s>", "<|tool|>"]
SPACE = "\u2581"
ENCODE = """
import json, sys
from research.interop import gguf
from research.text import gguf_tokenizer
texts, out = json.loads(open(sys.argv[1]).read()), {}
for path in sys.argv[3:]:
  metadata = gguf.open_gguf(path).metadata
  tokenizer, _ = gguf_tokenizer.tokenizer_from_gguf(metadata)
  out[path] = [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
open(sys.argv[2], "w").write(json.dumps(out))
"""


def texts() -> list[str]:
  """Returns random texts of all kinds of characters, and some prose."""
  rng, out = np.random.default_rng(0), []
  kinds = list(PIECES)
  for _ in range(1000):
    text = ""
    for _ in range(rng.integers(1, 12)):
      pieces = list(PIECES[kinds[rng.integers(len(kinds))]])
      text += "".join(rng.choice(pieces, rng.integers(1, 5)))
    out.append(text)
  for _ in range(1000):
    points = rng.integers(32, 0x3100, rng.integers(1, 8))
    out.append("".join(map(chr, points)))
  topics = pydoc_data.topics.topics
  prose = [topics[name] for name in sorted(topics)][:8]
  return [*out, *prose, "x<|tool|>y</s> z", " <|tool|> ", "cafe\u0301", ""]


def learned(model, before, alphabet) -> tuple[list[str], list[str]]:
  """Returns tokens and merges."""
  bare = tokenizers.Tokenizer(model)
  bare.pre_tokenizer = before
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=2000,
    initial_alphabet=alphabet,
    special_tokens=SPECIAL,
    show_progress=False,
    max_token_length=12,
  )
  bare.train_from_iterator(texts(), trainer)
  model = json.loads(bare.to_str())["model"]
  tokens = sorted(model["vocab"], key=model["vocab"].get)
  return tokens, [" ".join(pair) for pair in model["merges"]]


def write(path, tokens: list[str], types: list, fill) -> None:
  """Writes a file without tensors, which `fill` adds keys to."""
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_vocab_size(len(tokens))
  writer.add_token_list(tokens)
  writer.add_token_types(types)
  writer.add_unk_token_id(0)
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  fill(writer)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def byte_level(folder) -> dict:
  """Writes one vocabulary under each name of a rule; returns the files."""
  whole = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  model = tokenizers.models.BPE()
  tokens, merges = learned(model, whole, whole.alphabet())
  types = [gguf.TokenType.CONTROL] * len(SPECIAL)
  types += [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL))
  out = {pre: folder / f"{pre}.gguf" for pre in WORDS}
  for pre, path in out.items():

    def fill(writer, pre=pre):
      writer.add_tokenizer_model("gpt2")
      writer.add_tokenizer_pre(pre)
      writer.add_token_merges(merges)

    write(path, tokens, types, fill)
  return out


def sentencepiece(folder) -> dict:
  """Writes one vocabulary with and without a space in front."""
  before = tokenizers.pre_tokenizers.Metaspace(
    prepend_scheme="never", split=False
  )
  tokens, merges = learned(tokenizers.models.BPE(), before, [SPACE])
  pieces = tokens[len(SPECIAL) :]
  given = [f"<0x{b:02X}>" for b in range(256)]
  rank = {m.replace(" ", ""): i for i, m in reversed([*enumerate(merges)])}
  words = [*SPECIAL, *given, *pieces]
  types = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 3
  types += [gguf.TokenType.BYTE] * 256
  types += [gguf.TokenType.NORMAL] * len(pieces)
  scores = [-float(rank.get(w, len(merges))) for w in words]
  out = {name: folder / f"{i}.gguf" for i, name in enumerate(PREFIX)}
  for name, path in out.items():

    def fill(writer, prefix=name == PREFIX[0]):
      writer.add_tokenizer_model("llama")
      writer.add_token_scores(scores)
      writer.add_add_space_prefix(prefix)

    write(path, words, types, fill)
  return out


@pytest.fixture(scope="module")
def found(shared_heptad, tmp_path_factory):
  """Returns each file, and our tokens of the texts."""
  folder = tmp_path_factory.mktemp("words")
  given, out = folder / "texts.json", folder / "ids.json"
  given.write_text(json.dumps(texts()))
  files = byte_level(folder) | sentencepiece(folder)
  shared_heptad.script(ENCODE, given, out, *files.values())
  ids = json.loads(out.read_text())
  return {name: (path, ids[str(path)]) for name, path in files.items()}


@pytest.mark.parametrize("name", [*WORDS, *PREFIX])
def test_texts_are_cut_alike(name, found):
  path, ids = found[name]
  model = llama.llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
  for text, ours in zip(texts(), ids, strict=True):
    if name in COMPOSED:
      text = unicodedata.normalize("NFC", text)
    theirs = model.tokenize(text.encode(), add_bos=False, special=True)
    assert theirs == ours, text


def test_rules_cut_differently(found):
  assert len({json.dumps(found[name][1]) for name in WORDS}) == 5
