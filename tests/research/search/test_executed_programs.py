"""Ledgers of whole searches against the programs that ran, one by one.

Every program of a search is counted by `nn.flops` each time that it runs:
one token a program, so that no loop is multiplied. Prompts and steps fill their
buckets and no row ends early, so nothing is padded but masked pairs.
"""

import collections
import dataclasses
import functools

import jax
import numpy as np

from research.generation import decoding
from research.generation.boundary import Boundary
from research.generation.sampling import Sampling
from research.generation.stepwise import Stepwise
from research.nn import flops
from research.nn.flops import Cached, Causal, Dense, model_cost
from research.prm.heads import LinearHead
from research.prm.model import RewardModel
from research.search import cached_verifier
from research.search.engine import Engine
from research.search.generative_judge import (
  GenerativeJudge,
  LanguageModelWriter,
)
from research.search.reward_verifiers import verifier_of
from research.search.step_search import Limits
from research.search.strategies.beam import Beam
from tests import support

PROMPT = STEP = 16
NEW, CAPACITY = 2 * STEP, 48
PROMPTS = [list(range(1, 1 + PROMPT)), list(range(20, 20 + PROMPT))]
COPIES = 4
ROWS = len(PROMPTS) * COPIES
RULES = Sampling(temperature=1.2)
PROGRAMS = (
  *((decoding, name) for name in ("prefill", "decode", "select")),
  *((cached_verifier, name) for name in ("_start", "_read", "_select")),
)


class Executed:
  """FLOPs of every program, in the order in which they ran."""

  def __init__(self, monkeypatch):
    self.runs = collections.defaultdict(list)
    self._known = {}
    for module, name in PROGRAMS:
      program = getattr(module, name)
      watched = functools.partial(self._run, program, name)
      monkeypatch.setattr(module, name, watched)

  @property
  def total(self):
    return sum(map(sum, self.runs.values()))

  def _run(self, program, name, *args, **fields):
    leaves, tree = jax.tree.flatten((args, fields))
    arrays = {i: x for i, x in enumerate(leaves) if hasattr(x, "shape")}

    def traced(arrays):
      both = [arrays.get(i, x) for i, x in enumerate(leaves)]
      args, fields = jax.tree.unflatten(tree, both)
      return program(*args, **fields)

    shapes = name, tuple(x.shape for x in arrays.values())
    if shapes not in self._known:
      self._known[shapes] = flops.count_flops(traced, arrays)
    self.runs[name].append(self._known[shapes])
    return program(*args, **fields)


@functools.cache
def policy():
  model = support.model("llama", tied=False)
  none = np.zeros((1, model.vocab_size), bool)
  return Stepwise(
    model=model,
    params=support.params(model),
    sampling=RULES,
    boundary=Boundary(np.zeros_like(none, np.int32), none, np.int32(STEP)),
    size=1,
  )


@functools.cache
def reward():
  model = RewardModel(backbone=policy().model, head=LinearHead())
  params = model.with_new_head(policy().params, jax.random.key(3))
  return verifier_of(model, params)


def searched(verifier, prompts=PROMPTS):
  limits = Limits(tokens=NEW, key=jax.random.key(2))
  engine = Engine(policy=policy(), verifier=verifier)
  samples = Beam(copies=COPIES, width=2)(engine, prompts, limits)
  assert all(len(path.steps) == 2 for one in samples for path in one.paths)
  return samples


def masked(ran, needed):
  """FLOPs of pairs that a program multiplies, and masks."""
  return sum(
    4 * layer.heads_width * (ran.pairs(None) - needed.pairs(None))
    for layer in model_cost(policy().model).layers
  )


PROMPT_MASKED = masked(Dense(PROMPT, PROMPT), Causal(0, PROMPT))
POLICY_EXTRA = (
  len(PROMPTS) * PROMPT_MASKED
  + ROWS * masked(Cached(NEW - 1, CAPACITY), Causal(PROMPT, NEW - 1))
  # Each copy of a prompt has logits for its first token; one is needed.
  + (ROWS - len(PROMPTS)) * 2 * model_cost(policy().model).head
)
"""What the policy's programs multiply and the ledger does not count."""


def test_a_beams_ledger_is_the_sum_over_its_programs(monkeypatch):
  ran = Executed(monkeypatch)
  samples = searched(reward())
  counts = {name: len(found) for name, found in ran.runs.items()}
  # Prompts are read once by each model, whatever the number of paths.
  assert counts == {
    **{"prefill": 1, "decode": NEW - 1, "select": 1},
    **{"_start": 1, "_read": 2, "_select": 1},
  }
  assert not sum(ran.runs["select"] + ran.runs["_select"])
  own = sum(ran.runs["prefill"] + ran.runs["decode"]) - POLICY_EXTRA
  assert own == sum(one.ledger.flops_policy for one in samples)
  read = sum(ran.runs["_start"] + ran.runs["_read"])
  read -= len(PROMPTS) * PROMPT_MASKED
  read -= ROWS * masked(Cached(NEW, CAPACITY), Causal(PROMPT, NEW))
  assert read == sum(one.ledger.flops_verifier for one in samples)


def test_a_judges_ledger_is_the_sum_over_its_programs(monkeypatch):
  """A judge reads each conversation anew, and writes: its own programs."""
  written, room = 4, 32
  writer = LanguageModelWriter(
    model=policy().model,
    params=policy().params,
    encode=lambda turns: [1 + len(str(turns)) % 60] * PROMPT,
    decode=lambda tokens: " ".join(map(str, tokens)),
    sampling=RULES,
    max_new_tokens=written,
  )
  # One token a program here as well.
  vars(writer)["_policy"] = dataclasses.replace(writer._policy, size=1)
  judge = GenerativeJudge(writer=writer, text=lambda tokens: str(list(tokens)))
  ran = Executed(monkeypatch)
  samples = searched(judge)
  assert len(ran.runs["prefill"]) == 1 + 2  # the policy's, and one a step
  assert len(ran.runs["decode"]) == NEW - 1 + 2 * (written - 1)
  again = Cached(written - 1, room), Causal(PROMPT, written - 1)
  extra = POLICY_EXTRA + 2 * ROWS * (PROMPT_MASKED + masked(*again))
  assert ran.total - extra == sum(one.ledger.flops for one in samples)
  assert all(one.ledger.flops_verifier > 0 for one in samples)


def test_batches_of_a_shape_share_their_programs():
  """Other problems, of other lengths within the bucket, compile nothing."""
  searched(reward())
  programs = [getattr(module, name) for module, name in PROGRAMS]
  before = [program._cache_size() for program in programs]
  assert all(before)
  searched(reward(), [PROMPTS[1][:9], PROMPTS[0][::-1]])
  assert [program._cache_size() for program in programs] == before
