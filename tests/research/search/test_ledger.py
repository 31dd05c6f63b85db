"""The ledger against what traced programs multiply, and by enumeration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree
from research.errors import UserError
from research.generation import decoding, generate
from research.generation.sampling import GREEDY
from research.nn import flops, presets
from research.nn import flops as costs
from research.nn.flops import Cached, Causal, Dense
from research.nn.moe.routing import Routing
from research.search import ledger as ledgers
from research.search.ledger import Incremental, Ledger, Rescoring
from tests import support

PROMPT, NEW = 7, 5


def _programs(model, rows):
  """Returns the FLOPs of prefilling one prompt, and of a decoding step."""
  params = support.shapes(model)
  i32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
  width = generate.bucket(PROMPT)
  capacity = generate.bucket(PROMPT + NEW)

  def prefill(params, tokens, lengths, examples, limit, stop):
    return decoding.prefill(
      model,
      params,
      tokens,
      lengths,
      GREEDY,
      jax.random.key(0),
      examples,
      limit,
      stop,
      capacity,
    )

  def decode(params, state, stop):
    return decoding.decode(model, params, state, GREEDY, stop, NEW)

  def given(n):
    return params, i32((n, width)), *(i32((n,)) for _ in range(3)), i32((8,))

  state = jax.eval_shape(prefill, *given(rows))[0]
  first = flops.count_flops(prefill, *given(1))
  # A loop that may end early counts once: this is one step of all rows.
  step = flops.count_flops(decode, params, state, i32((8,)))
  return first, step, width, capacity


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_ledger_is_what_generations_programs_multiply(family):
  """Best of 3 from one prompt, which is read once; every new token a pass."""
  model, rows = support.model(family), 3
  cost = costs.model_cost(model)
  first, step, width, capacity = _programs(model, rows)
  executed = cost.forward(width, Dense(width, width), 1)
  executed += rows * (NEW - 1) * cost.forward(1, Cached(1, capacity), 1)
  assert executed == first + (NEW - 1) * step
  # What is needed is what is executed, but for padding and masked pairs.
  ideal = ledgers.generation(cost, PROMPT, [NEW] * rows)
  padded = 2 * (width - PROMPT) * cost.matrices
  masked = sum(
    4
    * layer.heads_width
    * (
      Dense(width, width).pairs(layer.window)
      - Causal(0, PROMPT).pairs(layer.window)
      + rows
      * (
        Cached(NEW - 1, capacity).pairs(layer.window)
        - Causal(PROMPT, NEW - 1).pairs(layer.window)
      )
    )
    for layer in cost.layers
  )
  assert executed - padded - masked == ideal.flops_policy


def test_a_models_matrices_are_its_parameters():
  def count(model, skip=("scale", "embed")):
    return sum(
      tree.count(leaf)
      for path, leaf in tree.flatten_paths(support.shapes(model))
      if not path.endswith(skip)
    )

  for family in ("llama", "gemma2"):
    model = support.model(family)
    cost = costs.model_cost(model)
    head = 0 if model.tied else cost.head
    assert cost.matrices + head == count(model)
    assert cost.head == 32 * 67
  routing = Routing(experts=4, active=2)
  sparse = presets.Sparse(routing=routing, hidden=12)
  model = support.model("qwen3_moe", sparse=sparse)
  idle = 3 * 2 * (3 * 32 * 12)  # layers, experts that a token does not use
  cost = costs.model_cost(model, outputs=1)
  assert cost.matrices == count(model, ("scale", "embed", "head")) - idle
  assert cost.head == 32  # a scalar's head
  assert sum(layer.cache for layer in cost.layers) == 3 * 2 * 2 * 8
  assert cost.two_n(10) == 20 * (cost.matrices + 32)


@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
def test_causal_pairs_are_counted_one_by_one(window):
  for start in range(8):
    for tokens in range(8):
      expected = sum(
        min(at + 1, window or 10**9) for at in range(start, start + tokens)
      )
      assert Causal(start, tokens).pairs(window) == expected


@pytest.fixture(name="cost")
def _cost():
  return costs.model_cost(support.model("llama"))


def test_best_of_n_reads_its_prompt_once(cost):
  """n times the greedy ledger, but for n - 1 prefills (section 16)."""
  greedy = ledgers.generation(cost, 20, [6])
  prefill = ledgers.prefill(cost, 20)
  for n in (1, 2, 16):
    found = ledgers.generation(cost, 20, [6] * n)
    expected = n * greedy.flops_policy - (n - 1) * prefill.flops_policy
    assert found.flops_policy == expected
    assert found.policy_prefill_tokens == 20
    assert found.policy_decode_tokens == 6 * n
    assert found.peak_cache_tokens == 20 + 5 * n


def test_pausing_at_a_step_costs_nothing(cost):
  """A prefill of n tokens is what n tokens cost that are fed one by one."""
  whole = ledgers.generation(cost, 10, [9])
  parts = ledgers.prefill(cost, 10)
  for start, tokens in ((10, 3), (13, 4), (17, 1)):
    parts += ledgers.decode(cost, start, tokens)
  assert parts.flops_policy == whole.flops_policy
  without_logits = cost.forward(5, Causal(0, 5), 0)
  fed = ledgers.decode(cost, 0, 5).flops_policy
  assert fed == without_logits + 2 * 5 * cost.head


def test_a_verifier_reads_every_token_once_or_again_and_again():
  scorer = costs.model_cost(support.model("llama"), outputs=1)
  ends = [[3, 5, 9], [4]]
  once = ledgers.verification(scorer, 10, ends)
  assert (once.verifier_prefill_tokens, once.verifier_new_tokens) == (10, 13)
  assert once.flops_policy == 0
  expected = scorer.forward(10, Causal(0, 10), 0)
  expected += scorer.forward(9, Causal(10, 9), 3)
  expected += scorer.forward(4, Causal(10, 4), 1)
  assert once.flops_verifier == expected
  again = ledgers.verification(scorer, 10, ends, Rescoring())
  assert again.verifier_prefill_tokens == 4 * 10
  assert again.verifier_new_tokens == 3 + 5 + 9 + 4
  assert again.flops_verifier == sum(
    scorer.forward(10 + x, Causal(0, 10 + x), 1) for x in (3, 5, 9, 4)
  )
  # One step of one sample: there is nothing to reuse but the prompt's scores.
  one = ledgers.verification(scorer, 10, [[4]])
  alone = ledgers.verification(scorer, 10, [[4]], Rescoring())
  assert one.flops == alone.flops
  # Rescoring grows with the square of the number of steps.
  long = [list(range(1, 65))]
  ratio = (
    ledgers.verification(scorer, 1, long, Rescoring()).verifier_new_tokens
    / ledgers.verification(scorer, 1, long, Incremental()).verifier_new_tokens
  )
  assert ratio == 65 / 2


def test_ledgers_add_up_and_peaks_do_not():
  first = Ledger(1, 2, 3, 4, 5, 6, 0.5, 70)
  second = Ledger(10, 20, 30, 40, 50, 60, 2.0, 7)
  both = first + second
  assert both == Ledger(11, 22, 33, 44, 55, 66, 2.5, 70)
  assert both.flops == 121
  at_once = first.alongside(second)
  assert (at_once.seconds, at_once.peak_cache_tokens) == (2.0, 77)
  assert Ledger(**both.to_json()) == both
  cost = costs.model_cost(support.model("llama"))
  assert both.two_n(cost, cost) == cost.two_n(33) + cost.two_n(77)


def test_training_is_paid_back_by_queries():
  """Two rows of the audit of "1B against 405B": 6 N D."""
  assert ledgers.training_flops(3 * 10**9, 9 * 10**12) == pytest.approx(1.62e23)
  assert ledgers.training_flops(405 * 10**9, 15 * 10**12) == pytest.approx(
    3.65e25, rel=2e-3
  )
  assert ledgers.break_even(600, 3) == 200
  assert np.isinf(ledgers.break_even(600, -1))


def test_what_has_no_formula_or_no_tokens_is_refused(cost):
  with pytest.raises(UserError, match="prompt of 0 tokens"):
    ledgers.generation(cost, 0, [3])
  with pytest.raises(UserError, match=r"samples of \[0\]"):
    ledgers.generation(cost, 3, [0])
  with pytest.raises(UserError, match="steps are not empty"):
    ledgers.verification(cost, 3, [[2, 2]])
  with pytest.raises(UserError, match="nn.flops"):
    time = presets.TimeEmbedding(features=8, hidden=8, width=8)
    costs.model_cost(support.model("llama", time_embedding=time))
