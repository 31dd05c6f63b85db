"""Generation equals a loop without a cache, for any batch."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from kernels_pallas.common import cpu_memory
from research import tree
from research.generation import decoding, generate, stream
from research.generation.sampling import GREEDY, Sampling
from research.nn import presets
from research.text.tokenizer import Tokenizer
from research.typing import UserError

V = 256
NEW = 21  # two chunks and a part
PROMPTS = [[5, 6, 7], [9] * 11, [1, 2, 3, 4, 5, 6]]
MODEL = presets.transformer(
  presets.FAMILIES["gemma2"],
  presets.Sizes(
    vocab=V,
    width=20,
    depth=2,
    heads=4,
    kv_heads=2,
    hidden=24,
    head_dim=6,
    window=5,
    logit_softcap=9.0,
    max_positions=40,
    tied=False,  # a tied random model says the same token for ever
  ),
)


@functools.cache
def params():
  tokens = jnp.zeros((1, 2), jnp.int32)
  found = jax.jit(MODEL.init)(jax.random.key(1), tokens)["params"]
  keys = jax.random.split(jax.random.key(2), len(jax.tree.leaves(found)))
  keys = jax.tree.unflatten(jax.tree.structure(found), list(keys))
  return jax.tree.map(
    lambda x, k: 0.7 * jax.random.normal(k, x.shape), found, keys
  )


@functools.cache
def reference(prompt, steps=NEW):
  """Greedy tokens by a full forward pass for each."""

  @jax.jit
  def next_(tokens, n):
    hidden, _ = MODEL.apply({"params": params()}, tokens)
    last = hidden[:, n - 1]
    return jnp.argmax(MODEL.apply({"params": params()}, last, method="logits"))

  text = list(prompt)
  for _ in range(steps):
    padded = np.zeros((1, 40), np.int32)
    padded[0, : len(text)] = text
    text.append(int(next_(padded, len(text))))
  return text[len(prompt) :]


def test_greedy_is_the_loop_without_a_cache():
  found = generate.generate(MODEL, params(), PROMPTS, NEW)
  assert found.tokens == [reference(tuple(p)) for p in PROMPTS]
  assert found.reasons == ["length"] * 3
  # Not a loop on one token, which much that is wrong would repeat too.
  assert min(len(set(tokens)) for tokens in found.tokens) > 3


@pytest.mark.slow
def test_a_batch_is_each_alone_and_prepared_is_not_another_model():
  whole = generate.generate(MODEL, tree.unroll(params()), PROMPTS, NEW)
  for prompt, tokens in zip(PROMPTS, whole.tokens, strict=True):
    alone = generate.generate(MODEL, params(), [prompt], NEW)
    assert alone.tokens == [tokens]


def test_samples_do_not_depend_on_their_batch():
  rules = Sampling(temperature=1.5, top_p=0.95, repetition_penalty=1.2)
  key = jax.random.key(4)
  whole = generate.generate(MODEL, params(), PROMPTS, NEW, rules, key)
  part = generate.generate(
    MODEL, params(), PROMPTS[2:0:-1], NEW, rules, key, examples=[2, 1]
  )
  assert part.tokens == whole.tokens[2:0:-1]
  other = generate.generate(
    MODEL, params(), PROMPTS, NEW, rules, jax.random.key(5)
  )
  assert all(a != b for a, b in zip(whole.tokens, other.tokens, strict=True))


def test_a_penalty_without_bound_never_repeats():
  rules = Sampling(repetition_penalty=1e9)
  # Positive logits only become small; the soft cap keeps them all finite.
  found = generate.generate(MODEL, params(), PROMPTS, NEW, rules).tokens
  for prompt, tokens in zip(PROMPTS, found, strict=True):
    assert len(set(tokens)) == NEW and not set(tokens) & set(prompt)


@pytest.mark.parametrize("at", [0, 1, 15, 16, 17])
def test_stop_tokens_end_a_row_and_only_that(at):
  tokens = [reference(tuple(p)) for p in PROMPTS]
  stop = tokens[0][at]
  found = generate.generate(
    MODEL, params(), PROMPTS, NEW, stop_tokens=[stop, 255]
  )
  for want, got, reason in zip(
    tokens, found.tokens, found.reasons, strict=True
  ):
    ends = [want.index(i) for i in (stop, 255) if i in want]
    assert got == want[: min(ends, default=NEW)]
    assert reason == ("stop" if ends else "length")


def test_the_device_stops_early():
  """No chunk is computed for rows that have ended."""
  first = reference(tuple(PROMPTS[0]))[0]
  parts = list(
    generate.chunks(MODEL, params(), PROMPTS[:1], NEW, stop_tokens=[first])
  )
  assert [p.tolist() for p in parts] == [[[first]]]


def test_one_compilation_a_shape():
  # Another model value, so that no other test has compiled it.
  model = MODEL.clone(max_positions=39)

  def sizes():
    return decoding.prefill._cache_size(), decoding.decode._cache_size()

  before = sizes()
  for i, prompt in enumerate([[1, 2], [3] * 9, [4] * 13]):
    rules = Sampling(temperature=0.5 + i, top_p=0.9)
    generate.generate(
      model,
      params(),
      [prompt],
      17 + i,
      rules,
      jax.random.key(i),
      stop_tokens=range(200, 200 + i),
    )
  assert [b - a for a, b in zip(before, sizes(), strict=True)] == [1, 1]


@pytest.mark.slow
def test_the_context_ends_a_row():
  found = generate.generate(MODEL, params(), [[1] * 37, [1] * 20], 9)
  assert [len(t) for t in found.tokens] == [3, 9]
  assert found.reasons == ["length"] * 2


@pytest.mark.parametrize(
  "prompts, new, words",
  [
    ([], 1, "prompts: found none"),
    ([[1], []], 1, "prompt 2: found no tokens"),
    ([[1] * 40], 1, "prompt 1: found 40 tokens.*context of 40"),
    ([[V]], 1, f"prompt 1: found token {V}"),
    ([[-1]], 1, "prompt 1"),
    ([[1]], 0, "max_new_tokens: found 0"),
  ],
)
def test_bad_prompts(prompts, new, words):
  with pytest.raises(UserError, match=words):
    generate.generate(MODEL, params(), prompts, new)


def test_bad_sampling():
  with pytest.raises(UserError, match="temperature"):
    generate.generate(MODEL, params(), [[1]], 1, Sampling(temperature=-1.0))


@pytest.mark.parametrize("n", [*range(1, 70), 100, 1000, 4097, 100_000])
def test_buckets_hold_and_waste_little(n):
  size = generate.bucket(n)
  assert n <= size <= max(n + 15, n * 9 / 8)
  assert generate.bucket(size) == size


# --- text --------------------------------------------------------------------


@functools.cache
def byte_tokenizer() -> Tokenizer:
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {c: i for i, c in enumerate(alphabet)}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  return Tokenizer(backend=backend)


def _texts(prompts, tokenizer=None, **kwargs):
  steps = list(
    stream.stream(
      MODEL,
      params(),
      tokenizer or byte_tokenizer(),
      prompts,
      NEW,
      **kwargs,
    )
  )
  return [
    (
      "".join(piece.text for piece in row),
      sum(piece.tokens for piece in row),
      [piece.reason for piece in row if piece.reason],
    )
    for row in zip(*steps, strict=True)
  ]


@pytest.mark.parametrize("size", [1, 5, 16])
def test_a_stream_is_the_text_of_its_tokens(size):
  tokens = [reference(tuple(p)) for p in PROMPTS]
  expected = [(byte_tokenizer().decode(t), NEW, ["length"]) for t in tokens]
  assert _texts(PROMPTS, size=size) == expected


@pytest.mark.parametrize("size", [1, 2, 16])
def test_stop_strings_span_tokens_and_chunks(size):
  tokens = reference(tuple(PROMPTS[0]))
  text = byte_tokenizer().decode(tokens)
  stop = text[len(text) // 2 : len(text) // 2 + 3]
  (found, read, reasons), *others = _texts(PROMPTS, size=size, stop=[stop])
  assert found == text[: text.index(stop)]
  assert reasons == ["stop"]
  assert len(byte_tokenizer().decode(tokens[:read])) >= len(found) + len(stop)
  for prompt, (other, _, _) in zip(PROMPTS[1:], others, strict=True):
    whole = byte_tokenizer().decode(reference(tuple(prompt)))
    assert other == whole.split(stop)[0]


def test_stop_tokens_are_no_text():
  tokens = reference(tuple(PROMPTS[0]))
  tokenizer = dataclasses.replace(byte_tokenizer(), stop=(tokens[4],))
  end = tokens.index(tokens[4])
  expected = (byte_tokenizer().decode(tokens[:end]), end, ["stop"])
  assert _texts(PROMPTS[:1], tokenizer)[0] == expected


def test_a_source_packs_its_own_cache():
  with pytest.raises(UserError, match="found 'int8' together with a source"):
    _texts([[1]], kv="int8", source=generate.chunks)


def test_complete_is_the_joined_stream():
  prompts = ["a b", "longer one"]
  found = stream.complete(MODEL, params(), byte_tokenizer(), prompts, NEW)
  ids = [byte_tokenizer().encode(p) for p in prompts]
  assert [(p.text, p.tokens, [p.reason]) for p in found] == _texts(ids)


def test_prepare_changes_the_layout_only():
  found = generate.prepare(params(), MODEL)
  assert len(tree.runs(found)) == 2
  half = MODEL.clone(dtype="bfloat16")
  assert generate.prepare(params(), half) is params()
  chex.assert_trees_all_equal(
    list(tree.layers(found)), list(tree.layers(params()))
  )
  assert Sampling() == GREEDY


def test_prepare_puts_weights_of_some_size_together(monkeypatch):
  half = MODEL.clone(dtype="bfloat16")
  with monkeypatch.context() as patch:
    patch.setattr(cpu_memory, "_can_have", lambda size: False)
    patch.setattr(cpu_memory, "MIN_BYTES", 0)
    assert generate.prepare(params(), half) is params()
  monkeypatch.setattr(cpu_memory, "MIN_BYTES", 0)
  if not cpu_memory._can_have(0):
    pytest.skip("this system has no huge pages")
  found = generate.prepare(params(), half)
  chex.assert_trees_all_equal(found, params())
  leaves = jax.tree.leaves(found)
  places = sorted(x.unsafe_buffer_pointer() for x in leaves)
  size = sum(-(-x.nbytes // 64) * 64 for x in leaves)
  assert places[0] % 2**21 == 0 and places[-1] < places[0] + size
