"""Sampling loops of masked diffusion models in torch, plain and slow.

Written from their descriptions: LLaDA's `generate` (Nie et al. 2025,
arXiv:2502.09992, algorithms 4 and 5, and what its code does where they are
silent), Fast-dLLM's thresholds and caches (Wu et al. 2025, arXiv:2505.22618)
and Dream's sampler (Ye et al. 2025, arXiv:2508.15487). Each asks a function for
logits of whole rows at every step. What is random comes from the caller, who
has it from the other side, so that both sides can be asked for the same tokens.

  model(tokens [B, T]) -> logits [B, T, V], each place's own

Caches need two more things of it:

  model.read(tokens [B, N], first place, past) -> logits [B, N, V] of the place
    after each where `model.shift`, keys and values of each layer, past included
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

Model = Callable[[torch.Tensor], torch.Tensor]
LOWEST = -1e30


@dataclasses.dataclass(kw_only=True)
class Wanted:
  """How LLaDA's loop fills rows; its own names but for `policy` and noise.

  Attributes:
    length, block, steps: as `gen_length`, `block_length` and `steps`.
    temperature: of Gumbel noise.
    cfg: strength of guidance by the prompt.
    remasking: `low_confidence` or `random`.
    policy: `quota`, `threshold` or `factor`, with `value`.
    cache: `none`, `prefix` or `dual`, Fast-dLLM's; without guidance.
    end: ids that end a text.
    ends: `never`: `logits_eos_inf`; `last`: what `confidence_eos_eot_inf` is
      for. Its code compares with minus infinity instead, for one of two ends.
    gumbel: `[S, B, K, V]`, noise of each step of the whole run.
    uniform: `[S, B, K]`, confidence of `random`.
  """

  length: int
  block: int
  steps: int | None = None
  temperature: float = 0.0
  cfg: float = 0.0
  remasking: str = "low_confidence"
  policy: str = "quota"
  value: float = 0.0
  cache: str = "none"
  end: tuple[int, ...] = ()
  ends: str = "any"
  gumbel: Any = None
  uniform: Any = None


def quotas(masks: int, steps: int) -> list[int]:
  """Returns how many places each step fills: even, the first ones more."""
  return [masks // steps + (i < masks % steps) for i in range(steps)]


def llada(
  model: Model, prompt: torch.Tensor, mask_id: int, wanted: Wanted
) -> tuple[torch.Tensor, int]:
  """Returns filled rows `[B, P + length]`, and calls of the model.

  Args:
    model: what is asked.
    prompt: `[B, P]`.
    mask_id: of the mask, which is never proposed.
    wanted: how.
  """
  rows, before = prompt.shape
  x = torch.full((rows, before + wanted.length), mask_id)
  x[:, :before] = prompt
  given = x != mask_id
  calls = 0
  for first in range(before, x.shape[1], wanted.block):
    inside = slice(first, first + wanted.block)
    blocks = wanted.length // wanted.block
    steps = (wanted.steps or wanted.length) // blocks
    plan = quotas(wanted.block, steps)
    step, kept = 0, None
    while (x[:, inside] == mask_id).any():
      if wanted.cache == "none":
        logits = guided(model, x, given, mask_id, wanted.cfg)
      else:
        logits, kept = cached(model, x, inside, wanted.cache, kept)
      logits[..., mask_id] = LOWEST
      if wanted.ends == "never":
        logits[..., list(wanted.end)] = LOWEST
      _commit(x, logits, inside, mask_id, wanted, calls, plan, step)
      step, calls = step + 1, calls + 1
  return x, calls


def guided(model, x, given, mask_id, scale) -> torch.Tensor:
  """Returns `u + (scale + 1)(c - u)`; u has masks in the prompt's place."""
  if scale == 0:
    return model(x).clone()
  blind = torch.where(given, mask_id, x)
  c, u = model(torch.cat([x, blind])).chunk(2)
  return u + (scale + 1) * (c - u)


def cached(model, x, inside, cache, kept) -> tuple[torch.Tensor, Any]:
  """Returns logits of which those `inside` count, and what the cache keeps.

  Args:
    model, x: see `llada`.
    inside: the block.
    cache: `prefix`: later calls read the block and all behind it; `dual`: the
      block.
    kept: what an earlier call of the block returned, or None.
  """
  start, stop = inside.start, inside.stop
  if cache == "prefix":
    stop = x.shape[1]
  if kept is None:
    logits, past = model.read(x, 0, None)
    rest = [
      [torch.cat([y[:, :, :start], y[:, :, stop:]], dim=2) for y in layer]
      for layer in past
    ]
    kept = rest, logits[:, start - 1]
  else:
    own, _ = model.read(x[:, start:stop], start, kept[0])
    logits = own.new_zeros(*x.shape, own.shape[-1])
    logits[:, start:stop], logits[:, start - 1] = own, kept[1]
  if model.shift:
    logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
  return logits, kept


def _commit(x, logits, inside, mask_id, wanted, call, plan, step) -> None:
  """Fills what a step of LLaDA's loop fills, in place."""
  some = logits[:, inside].double()
  noisy = some
  if wanted.temperature > 0:
    noisy = some + wanted.temperature * wanted.gumbel[call].double()
  found = noisy.argmax(-1)
  if wanted.remasking == "random":
    sure = wanted.uniform[call].double()
  else:
    sure = some.softmax(-1).gather(-1, found[..., None])[..., 0]
  if wanted.ends == "last":
    ends = torch.isin(found, torch.tensor(wanted.end))
    sure = torch.where(ends, -1.0, sure)
  for row in range(x.shape[0]):
    masked = x[row, inside] == mask_id
    order = torch.where(masked, sure[row], LOWEST)
    order = torch.argsort(order, descending=True, stable=True)
    order = order[: int(masked.sum())]
    number = count(wanted, sure[row][order].tolist(), plan, step)
    for place in order[:number].tolist():
      x[row, inside.start + place] = found[row, place]


def count(wanted, sure: list[float], plan: list[int], step: int) -> int:
  """Returns how many of the surest places, best first, are filled."""
  if not sure:
    return 0
  if wanted.policy == "quota":
    return plan[step] if step < len(plan) else 0
  number = 1
  while number < len(sure):
    rank = number + 1
    least = wanted.value
    if wanted.policy == "factor":
      least = 1 - wanted.value / (rank + 1)
    if sure[number] < least:
      break
    number += 1
  return number


def dream_times(steps: int, eps: float = 1e-3) -> torch.Tensor:
  """Returns the times between which Dream's steps go, `steps + 1` of them."""
  return torch.linspace(1, eps, steps + 1, dtype=torch.float64)


def dream(
  model: Model,
  prompt: torch.Tensor,
  mask_id: int,
  length: int,
  steps: int,
  algorithm: str,
  uniform: torch.Tensor | None = None,
  gumbel: torch.Tensor | None = None,
) -> torch.Tensor:
  """Returns rows as Dream's sampler fills them, greedily but for `gumbel`.

  Args:
    model: logits of each place's own, already shifted.
    prompt: `[B, P]`.
    mask_id: of the mask, which is never proposed.
    length: tokens after it.
    steps: between time 1 and 0.001.
    algorithm: `origin`: every mask is filled by chance; `maskgit_plus`,
      `topk_margin`, `entropy`: the surest ones are.
    uniform: `[S, B, P + length]`, the chances of `origin`.
    gumbel: `[S, B, P + length, V]`, added to logits; None for temperature 0.
  """
  rows, before = prompt.shape
  x = torch.full((rows, before + length), mask_id)
  x[:, :before] = prompt
  times = dream_times(steps)
  for i in range(steps):
    masked = x == mask_id
    logits = model(x).double()
    logits[..., mask_id] = LOWEST
    p = logits.softmax(-1)
    best, found = p.max(-1)
    if gumbel is not None:
      found = (logits + gumbel[i].double()).argmax(-1)
    share = float(1 - times[i + 1] / times[i]) if i < steps - 1 else 1.0
    if algorithm == "origin":
      filled = masked & (uniform[i] < share)
    else:
      sure = best
      if algorithm == "topk_margin":
        top = p.topk(2, dim=-1).values
        sure = top[..., 0] - top[..., 1]
      elif algorithm == "entropy":
        sure = (p * (p + 1e-10).log()).sum(-1)
      filled = _surest(sure, masked, share)
    x = torch.where(filled, found, x)
  return x


def _surest(sure, masked, share) -> torch.Tensor:
  """Returns the places of the surest `share` of each row's masks."""
  filled = torch.zeros_like(masked)
  for row in range(masked.shape[0]):
    number = int(int(masked[row].sum()) * share)
    order = torch.where(masked[row], sure[row], LOWEST)
    order = torch.argsort(order, descending=True, stable=True)
    filled[row, order[:number]] = True
  return filled
