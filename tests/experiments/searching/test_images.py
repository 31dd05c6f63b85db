"""Labels, reward models and searches of a policy that reads pictures.

A tiny vision language model with random weights, whose own greedy answers to
whole prompts are the truth.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.labelling.label_run import LabelRun
from experiments.searching import sampling
from experiments.searching.search_run import SearchRun
from experiments.searching.verifiers import TrainedModel, TrainedReward
from kernels_pallas.masks import Mask
from research.diffusion.sampling.config import SamplerConfig
from research.generation import generate
from research.generation.sampling import GREEDY
from research.interop import rewards
from research.interop.diffusion.spec import Spec
from research.interop.loaded import Loaded
from research.prm import formats, judge
from research.prm.labelled import LabelledSolution
from research.prm.objective import StepReward
from research.prm.rows import LabelledRows
from research.reasoning import words
from research.reasoning.prompting import arrays_of
from research.reasoning.tasks import Chain
from research.reasoning.tasks.chain import vocabulary
from research.search.strategies.independent import Independent
from research.typing import UserError
from research.vlm import masks
from research.vlm.objective import WithImages
from research.vlm.prompts import DrawnQuestion, WordGrid
from tests import support_vlm

TASK = Chain(terms=(2, 2), digits=1, totals=(0, 18), count=6)
NAMES = (*vocabulary(0, 18), *(f"w{i}" for i in range(42)))
WORDS = words.word_tokenizer(NAMES)
"""A word for each id of the model."""

DRAWN = DrawnQuestion(
  draw=WordGrid(columns=2, rows=2, cell=8, capital=4, scatter=1),
  preprocessor=support_vlm.PREPROCESSOR,
  image_token=support_vlm.IMAGE,
  text="=",
)
NEW = 6


@dataclasses.dataclass(frozen=True)
class Source:
  """The model, which never ends a text by itself."""

  mask: masks.PromptMask = masks.Causal()
  diffusion: Spec | None = None

  def load(self, shardings=None):
    del shardings
    return Loaded(
      dataclasses.replace(support_vlm.model(), mask=self.mask),
      support_vlm.params(),
      WORDS,
      {},
      diffusion=self.diffusion,
      preprocessor=support_vlm.PREPROCESSOR,
    )


def greedy(problems):
  """Returns the policy's own answers, whose every pass has the images."""
  asked = [DRAWN(WORDS, x.prompt) for x in problems]
  pixels = jnp.asarray(arrays_of(asked)["pixels"])
  vlm = support_vlm.model()
  with_pixels = vlm.with_images(support_vlm.params(), pixels)
  found = generate.generate(vlm.language, with_pixels, asked, NEW).tokens
  return [[int(token) for token in row] for row in found]


def search(**settings):
  run = SearchRun(
    task=TASK,
    policy=Source(),
    strategy=Independent(copies=1),
    problems=(0, 4),
    prompting=DRAWN,
    sampling=GREEDY,
    new_tokens=NEW,
    stop_tokens=(1000,),  # none of the model's: no text ends by itself
    batch=4,
    **settings,
  )
  problems = sampling.problems_of(run)
  (found,) = sampling.batches(run)
  return problems, found


def test_a_search_writes_what_the_model_answers():
  problems, found = search()
  answers = greedy(problems)
  assert len({tuple(x) for x in answers}) > 1  # the pictures differ alone
  for one, tokens in zip(found, answers, strict=True):
    (sample,) = one.samples
    assert sample.trace.text == WORDS.decode(tokens)
    assert one.ledger.flops_policy > one.prompt_ledger.flops_policy > 0


@pytest.mark.slow
def test_a_reward_model_that_sees_judges_a_search(monkeypatch):
  loaded = rewards.WithHead(backbone=Source(), seed=2).load()
  made = TrainedModel(
    *(loaded.model.language, loaded.params["language"]),
    *(loaded.tokenizer, None, (loaded.model, loaded.params)),
  )
  monkeypatch.setattr(
    "experiments.searching.verifiers.reward_of", lambda *_: made
  )
  problems, found = search(verifier=TrainedReward(workdir="unused"))
  for problem, one in zip(problems, found, strict=True):
    (sample,) = one.samples
    solution = LabelledSolution(
      prompt=problem.prompt, steps=(sample.trace.text,), labels=(None,)
    )
    [expected] = judge.score_solutions(
      *(loaded.model, loaded.params, WORDS, [solution]), prompting=DRAWN
    )
    np.testing.assert_allclose(sample.scores, expected, atol=1e-5)
    assert one.ledger.flops_verifier > 0


class Ends:
  """The words, of which all end a text: no sample is cut."""

  stop = tuple(range(len(NAMES)))

  def __getattr__(self, name):
    return getattr(WORDS, name)


@pytest.mark.slow
def test_labels_and_losses_of_pictures(tmp_path, monkeypatch):
  run = LabelRun(
    task=TASK,
    policy=Source(),
    segmenter="semicolon",
    problems=(0, 3),
    copies=2,
    new_tokens=NEW,
    sampling=GREEDY,
    prompting=DRAWN,
    rows=8,
  )
  sampler = run._sampler(TASK[:1])
  prompts = [sampler.prompt(x) for x in TASK[:3]]
  ends = dataclasses.replace(sampler, tokenizer=Ends())
  texts = ends(prompts, jax.random.key(0))
  # Every token ends a text, so that the first one is the whole of it.
  expected = [WORDS.decode(x[:1]) for x in greedy(TASK[:3])]
  assert texts == expected
  # The same solutions, right ones, as rows of a reward model.
  made = [
    dataclasses.replace(one, labels=(1,) * len(one.steps))
    for one in _solutions()
  ]
  path = tmp_path / "labels.jsonl"
  formats.write(str(path), made, formats.FORMATS["native"])
  data = LabelledRows(paths=str(path), length=16, prompting=DRAWN)
  batch = jax.tree.map(jnp.asarray, data.rows(WORDS).take(np.arange(3)))
  loaded = rewards.WithHead(backbone=Source(), seed=2).load()
  loss = WithImages(model=loaded.model, objective=StepReward())
  total, weight, found = loss(loaded.params, batch, None)
  scores = judge.score_solutions(
    loaded.model, loaded.params, WORDS, made, prompting=DRAWN, batch_size=2
  )
  each = np.array(scores)[:, 0]
  assert float(weight) == 3 and len(set(each.round(6))) == 3
  assert float(total) == pytest.approx(-np.log(each).sum(), rel=1e-4)
  assert float(found["score"]) == pytest.approx(each.sum(), rel=1e-4)
  # Drawn elsewhere, the same problems have other scores.
  moved = dataclasses.replace(
    DRAWN, draw=dataclasses.replace(DRAWN.draw, seed=1)
  )
  other = judge.score_solutions(
    loaded.model, loaded.params, WORDS, made, prompting=moved, batch_size=2
  )
  assert np.abs(np.array(other)[:, 0] - each).max() > 1e-4


@pytest.mark.parametrize(
  "mask",
  [
    masks.BidirectionalPrompt(),
    masks.BidirectionalImages(image_token=support_vlm.IMAGE),
  ],
)
def test_reward_models_of_prompts_that_are_not_causal_are_refused(mask):
  """Their objective and `judge` know no mask, and a search reads by it."""
  with pytest.raises(UserError, match=f"the mask {type(mask).__name__}, exp"):
    rewards.WithHead(backbone=Source(mask)).load()


def test_reward_models_of_masked_diffusion_are_refused():
  source = Source(diffusion=Spec(mask_id=2))
  with pytest.raises(UserError, match="a model of masked diffusion, expected"):
    rewards.WithHead(backbone=source).load()


def _solutions():
  return [
    LabelledSolution(
      prompt=problem.prompt,
      steps=tuple(TASK.solution(problem)),
      labels=(None,),
    )
    for problem in TASK[:3]
  ]


def test_a_policy_that_reads_pictures_is_asked_with_pictures():
  with pytest.raises(UserError, match="reads pixels"):
    run = SearchRun(
      task=TASK, policy=Source(), strategy=Independent(), problems=(0, 2)
    )
    next(sampling.batches(run))


def test_a_sampler_that_goes_on_behind_an_end_is_an_error():
  """Each of its solutions would be cut, and none would have an answer."""
  with pytest.raises(UserError, match="sampler: found stop_early=False"):
    search(sampler=SamplerConfig(stop_early=False))


@pytest.mark.parametrize("block", [None, 4])
def test_a_model_of_masks_needs_a_sampler(block):
  source = Source(diffusion=Spec(mask_id=66, shift=True, block=block))
  run = SearchRun(
    task=TASK, policy=source, strategy=Independent(), problems=(0, 2),
    prompting=DRAWN, stop_tokens=(1000,),
  )  # fmt: skip
  with pytest.raises(UserError, match="SearchRun.policy, without a sampler"):
    next(sampling.batches(run))


def test_a_diffusion_policy_fills_blocks_with_its_picture_in_sight():
  mask, block = 66, 3
  config = SamplerConfig(mask_id=mask, block=block, length=NEW)
  problems, found = search(sampler=config)
  vlm = support_vlm.model()
  for problem, one in zip(problems, found, strict=True):
    (sample,) = one.samples
    prompt = DRAWN(WORDS, problem.prompt)
    with_pixels = vlm.with_images(
      support_vlm.params(), jnp.asarray(prompt.arrays["pixels"][None])
    )
    row, log_prob = [*prompt, *[mask] * NEW], 0.0
    for step in range(NEW):
      # The surest place of the first block that has a mask.
      start = len(prompt) + step // block * block
      logits = _logits(vlm.language, with_pixels, row).at[:, mask].set(-np.inf)
      chances = np.asarray(jax.nn.softmax(logits, -1))
      open_ = [i for i in range(start, start + block) if row[i] == mask]
      at = max(open_, key=lambda i: chances[i].max())
      row[at] = int(chances[at].argmax())
      log_prob += float(np.log(chances[at].max()))
    assert sample.trace.text == WORDS.decode(row[len(prompt) :])
    assert sample.trace.logprob_sum == pytest.approx(log_prob, abs=1e-4)
    assert one.prompt_ledger.flops_policy > 0
  # The pictures differ alone, and so do the chances of what is filled in.
  sums = [one.samples[0].trace.logprob_sum for one in found]
  assert np.abs(np.diff(sums)).min() > 1e-3


def _logits(model, params, row):
  tokens = jnp.asarray([row])
  hidden, _ = model.apply({"params": params}, tokens, mask=Mask.full())
  return model.apply({"params": params}, hidden, method="logits")[0]
