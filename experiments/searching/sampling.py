"""Searches a run's problems, batch by batch.

Batches have one shape: the last one repeats its last problem, and all prompts
are padded to the longest one, so that programs compile once. Random keys are
those of a batch's first problem, so a run that goes on has the same texts.
"""

import dataclasses
import functools
import time
from collections.abc import Collection, Iterator, Sequence

import jax

from experiments.core import cli
from experiments.generating import policies
from experiments.generating.diffusion import check_next_token
from experiments.searching.context import Context
from experiments.searching.free_verifiers import ReadsProblems
from experiments.searching.pool import Sample, Searched
from experiments.searching.prompts import IdWords
from experiments.searching.search_run import SearchRun
from experiments.searching.step_ends import AtEnd
from experiments.searching.strategies import TextStrategy
from research.generation.stepwise import Stepwise
from research.interop.loaded import Loaded
from research.reasoning.isolation import guard
from research.reasoning.problem import Problem, Verdict
from research.reasoning.trace import Finish, Sampler, Step, Trace
from research.search.engine import Engine
from research.search.lookahead import Lookahead
from research.search.policy import Path, StepText, steps_of
from research.search.step_search import Limits, Samples, Strategy
from research.typing import UserError


def batches(
  run: SearchRun, done: Collection[str] = ()
) -> Iterator[list[Searched]]:
  """Opens the models; yields each batch's problems that are not done yet.

  Raises:
    UserError: the task has too few problems, or what models and searches raise.
  """
  problems = problems_of(run)
  todo = [
    start
    for start in range(0, len(problems), run.batch)
    if any(x.id not in done for x in problems[start : start + run.batch])
  ]
  if not todo:
    return iter(())
  search = Search(run, problems)

  def searched(start: int) -> list[Searched]:
    batch = problems[start : start + run.batch]
    results = search(batch, run.problems[0] + start)
    return [x for x in results if x.problem.id not in done]

  return map(searched, todo)


def problems_of(run: SearchRun) -> list[Problem]:
  """Returns a run's problems: of the task's different ones, a range.

  Raises:
    UserError: the task has not so many.
  """
  first, last = run.problems
  distinct: dict[str, Problem] = {}
  for problem in run.task:
    distinct.setdefault(problem.id, problem)
    if len(distinct) == last:
      return list(distinct.values())[first:]
  raise UserError(
    f"SearchRun.problems: found {len(distinct)} different ones among the"
    f" {len(run.task)} of {type(run.task).__name__}, expected {last}; raise its"
    " count, or give it more room."
  )


class Search:
  """A run's models, loaded, and what its batches have in common."""

  def __init__(self, run: SearchRun, problems: Sequence[Problem]):
    """Loads the models.

    Args:
      problems: all of them, for the longest prompt.
    """
    cli.loading(run.policy)
    loaded = run.policy.load()
    self._run = run
    self._words = IdWords() if loaded.tokenizer is None else loaded.tokenizer
    self._prompts = {
      x.id: run.prompting(self._words, x.prompt) for x in problems
    }
    self._question = problems[0].prompt
    context = self._context_of(loaded)
    self._engine = self._engine_of(context)
    # The weights as they were loaded are not needed again.
    self._context = dataclasses.replace(context, params={})

  def _context_of(self, loaded: Loaded) -> Context:
    run = self._run
    stop = self._words.stop if run.stop_tokens is None else run.stop_tokens
    if not stop:
      raise UserError(
        "SearchRun.stop_tokens: found none, nor an EOS token in the model's"
        " tokenizer, expected ids that end a solution: a truncated one has no"
        " answer."
      )
    prompts = list(self._prompts.values())
    source = policies.policy_of(loaded, prompts, "SearchRun.policy")
    room = max(map(len, prompts))
    if run.sampler is None:
      check_next_token(loaded, "SearchRun.policy, without a sampler")
      policy = Stepwise(
        model=source.model,
        params=source.params,
        sampling=run.sampling,
        stop_tokens=tuple(stop),
        boundary=run.steps(self._words, source.model.vocab_size),
        log_probs=True,
        prompt_room=room,
        reader=source.reader,
      )
    else:
      if not isinstance(run.steps, AtEnd):
        raise UserError(
          f"SearchRun.steps: found {type(run.steps).__name__} and a sampler of"
          " masked diffusion, whose blocks are the steps; expected AtEnd, and"
          " SamplerConfig.block"
        )
      policy = policies.diffusion_policy(
        *(source, run.sampler, loaded.diffusion, stop, run.new_tokens),
        run.sampling,
      )
    return Context(
      policy=policy,
      prompt_room=room,
      params=source.loaded,
      prompts=tuple(prompts[:1]),
      questions=(self._question,),
      tokenizer=self._words,
      prompting=run.prompting,
      task=run.task,
      judge=guard(run.judge, run.task, run.judge_timeout),
    )

  def _engine_of(self, context: Context) -> Engine:
    run = self._run
    if run.verifier is None:
      return Engine(policy=context.policy)
    cli.loading(run.verifier)
    verifier = run.verifier.load(context)
    silent = tuple(
      x for x in context.policy.stop_tokens if not self._words.decode([x])
    )
    make = Engine
    if run.lookahead:
      make = functools.partial(Lookahead, steps=run.lookahead)
    return make(
      policy=context.policy,
      verifier=verifier,
      silent=silent,
      timeout=run.timeout,
    )

  def __call__(self, problems: Sequence[Problem], first: int) -> list[Searched]:
    """Returns what is found for the problems of a batch."""
    begin, run = time.perf_counter(), self._run
    batch = [*problems, *[problems[-1]] * (run.batch - len(problems))]
    limits = Limits(
      tokens=run.new_tokens,
      steps=run.most_steps,
      key=jax.random.fold_in(jax.random.key(run.seed), first),
    )
    prompts = [self._prompts[x.id] for x in batch]
    strategy, engine = self._strategy(batch), self._engine
    if isinstance(engine.verifier, ReadsProblems):
      verifier = engine.verifier.with_problems(batch)
      engine = dataclasses.replace(engine, verifier=verifier)
    samples_of_each = strategy(engine, prompts, limits)[: len(problems)]
    results = [
      self._searched(problem, samples)
      for problem, samples in zip(problems, samples_of_each, strict=True)
    ]
    # Ledgers add up: each problem has its share of the batch's time.
    seconds = (time.perf_counter() - begin) / len(results)
    return [
      dataclasses.replace(
        x, ledger=dataclasses.replace(x.ledger, seconds=seconds)
      )
      for x in results
    ]

  def _strategy(self, problems: Sequence[Problem]) -> Strategy:
    strategy = self._run.strategy
    if not isinstance(strategy, TextStrategy):
      return strategy
    context = dataclasses.replace(self._context, problems=tuple(problems))
    return strategy.of_tokens(context)

  def _searched(self, problem: Problem, samples: Samples) -> Searched:
    verdict_of = functools.cache(
      functools.partial(self._context.judge.verify, problem)
    )
    made = []
    for path in samples.paths:
      text, steps = steps_of(path, self._words.decode)
      verdict = verdict_of(text)
      trace = trace_of(path, steps, problem.id, verdict, self._sampler)
      made.append(Sample(trace, verdict, path.root))
    once = self._engine.prompt_cost(len(self._prompts[problem.id]))
    return Searched(problem, tuple(made), samples.ledger, once)

  @functools.cached_property
  def _sampler(self) -> Sampler:
    rules = self._run.sampling
    return Sampler(
      temperature=0.0 if rules.temperature is None else rules.temperature,
      top_p=1.0 if rules.top_p is None else rules.top_p,
      seed=self._run.seed,
      policy_id=_policy_id(self._run),
    )


def _policy_id(run: SearchRun) -> str:
  """Returns the policy's name or folder, else the kind of its source."""
  for field in ("name", "workdir"):
    if identifier := getattr(run.policy, field, None):
      return str(identifier)
  return type(run.policy).__name__


def trace_of(
  path: Path,
  steps: Sequence[StepText],
  problem_id: str,
  verdict: Verdict,
  sampler: Sampler,
) -> Trace:
  """Returns a path, and its steps from `policy.steps_of`, as a trace."""
  answer = verdict.canonical
  return Trace(
    problem_id=problem_id,
    steps=tuple(Step(*x) for x in steps),
    finish=finish_of(path),
    final_answer=answer if answer and answer.strip() else None,
    n_prompt=path.prompt,
    n_new=len(path.tokens),
    logprob_sum=path.log_prob,
    sampler=sampler,
  )


def finish_of(path: Path) -> Finish:
  """Returns why a path ended: by itself, or out of tokens, or out of steps."""
  if path.stopped:
    return "eos"
  return "length" if path.done else "cap"
