"""What a search costs, the verifier included: tokens, FLOPs, seconds, cache.

A prefix that several samples share is read once. Every token that the policy
writes is read by the verifier at least once: once with a cache (`Incremental`),
or with all that stands before it at the end of every step (`Rescoring`, what an
engine without a cache executes).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from research.errors import UserError
from research.nn.flops import Causal, ModelCost


@dataclasses.dataclass(frozen=True)
class Ledger:
  """The cost of one or several problems; ledgers add up.

  Attributes:
    policy_prefill_tokens: tokens of prompts, each read once.
    policy_decode_tokens: tokens that the policy wrote.
    verifier_prefill_tokens: tokens of prompts that the verifier read.
    verifier_new_tokens: tokens after the prompt that it read, counted again
      where it read them again.
    flops_policy, flops_verifier: FLOPs of each.
    seconds: wall time.
    peak_cache_tokens: most tokens in the policy's cache at once.
    verifier_decode_tokens: tokens that the verifier wrote, as judges do.
  """

  policy_prefill_tokens: int = 0
  policy_decode_tokens: int = 0
  verifier_prefill_tokens: int = 0
  verifier_new_tokens: int = 0
  flops_policy: int = 0
  flops_verifier: int = 0
  seconds: float | int = 0.0
  peak_cache_tokens: int = 0
  verifier_decode_tokens: int = 0

  @property
  def flops(self) -> int:
    """Of policy and verifier."""
    return self.flops_policy + self.flops_verifier

  def __add__(self, other: "Ledger") -> "Ledger":
    """Returns the cost of one after the other: peaks do not add up."""
    return self._with(other, max)

  def alongside(self, other: "Ledger") -> "Ledger":
    """Returns the cost of both at once: peaks add up, seconds do not."""
    both = self._with(other, lambda x, y: x + y)
    seconds = max(self.seconds, other.seconds)
    return dataclasses.replace(both, seconds=seconds)

  def _with(self, other: "Ledger", peak: Any) -> "Ledger":
    sums = {
      field.name: getattr(self, field.name) + getattr(other, field.name)
      for field in dataclasses.fields(self)
    }
    most = peak(self.peak_cache_tokens, other.peak_cache_tokens)
    return Ledger(**sums | {"peak_cache_tokens": most})

  def two_n(self, policy: ModelCost, verifier: ModelCost | None = None) -> int:
    """Returns the FLOPs by the usual `2 N` a token, beside the exact ones."""
    tokens = self.policy_prefill_tokens + self.policy_decode_tokens
    flops = policy.two_n(tokens)
    if verifier is not None:
      read = self.verifier_prefill_tokens + self.verifier_new_tokens
      flops += verifier.two_n(read + self.verifier_decode_tokens)
    return flops

  def to_json(self) -> dict[str, int | float]:
    """Returns its fields."""
    return dataclasses.asdict(self)


def prefill(cost: ModelCost, tokens: int) -> Ledger:
  """Returns the cost of reading a prompt, and of its last token's logits."""
  return Ledger(
    policy_prefill_tokens=tokens,
    flops_policy=cost.forward(tokens, Causal(0, tokens), 1),
    peak_cache_tokens=tokens,
  )


def decode(cost: ModelCost, start: int, tokens: int) -> Ledger:
  """Returns the cost of tokens that are fed to the policy one by one.

  Args:
    start: tokens in the cache.
    tokens: fed after them, logits computed at each.
  """
  return Ledger(
    policy_decode_tokens=tokens,
    flops_policy=cost.forward(tokens, Causal(start, tokens), tokens),
    peak_cache_tokens=start + tokens,
  )


def generation(cost: ModelCost, prompt: int, new: Sequence[int]) -> Ledger:
  """Returns the cost of samples of one prompt, which is read once.

  A sample's first token is drawn from the prompt's logits, and its last one is
  never fed: n new tokens are n - 1 passes.

  Args:
    prompt: number of its tokens.
    new: tokens that each sample wrote, the end token included.

  Raises:
    UserError: a sample has no token, or the prompt none.
  """
  if prompt < 1 or min(new, default=0) < 1:
    raise UserError(
      f"generation: found a prompt of {prompt} tokens and samples of"
      f" {list(new)[:8]}, expected one token at least of each"
    )
  first = prefill(cost, prompt)
  flops = sum(decode(cost, prompt, n - 1).flops_policy for n in new)
  return dataclasses.replace(
    first,
    policy_decode_tokens=sum(new),
    flops_policy=first.flops_policy + flops,
    peak_cache_tokens=prompt + sum(n - 1 for n in new),
  )


@runtime_checkable
class Reading(Protocol):
  """How a verifier reads samples in steps."""

  def __call__(
    self, cost: ModelCost, prompt: int, ends: Sequence[Sequence[int]]
  ) -> Ledger:
    """Returns the cost; arguments as for `verification`."""
    ...


@dataclasses.dataclass(frozen=True)
class Incremental:
  """A cache: the prompt once for all samples, each new token once."""

  def __call__(
    self, cost: ModelCost, prompt: int, ends: Sequence[Sequence[int]]
  ) -> Ledger:
    """Returns the cost; a score is computed at the end of every step."""
    flops = cost.forward(prompt, Causal(0, prompt), 0)
    tokens = 0
    for steps in ends:
      last = steps[-1] if steps else 0
      flops += cost.forward(last, Causal(prompt, last), len(steps))
      tokens += last
    return Ledger(
      verifier_prefill_tokens=prompt,
      verifier_new_tokens=tokens,
      flops_verifier=flops,
    )


@dataclasses.dataclass(frozen=True)
class Rescoring:
  """No cache: at the end of each step, prompt and all steps so far."""

  def __call__(
    self, cost: ModelCost, prompt: int, ends: Sequence[Sequence[int]]
  ) -> Ledger:
    """Returns the cost: quadratic in the number of steps."""
    reads = [end for steps in ends for end in steps]
    return Ledger(
      verifier_prefill_tokens=prompt * len(reads),
      verifier_new_tokens=sum(reads),
      flops_verifier=sum(
        cost.forward(prompt + end, Causal(0, prompt + end), 1) for end in reads
      ),
    )


def verification(
  cost: ModelCost,
  prompt: int,
  ends: Sequence[Sequence[int]],
  reading: Reading = Incremental(),
) -> Ledger:
  """Returns what the verifier's scores of all steps cost.

  Args:
    prompt: number of its tokens.
    ends: for each sample, the number of new tokens at each step's end.
    reading: with a cache, or without.

  Raises:
    UserError: ends do not rise.
  """
  for i, steps in enumerate(ends):
    if any(b <= a for a, b in zip([0, *steps], steps, strict=False)):
      raise UserError(
        f"verification: found ends {list(steps)[:8]} of sample {i}, expected"
        " them to rise from 1 on: steps are not empty"
      )
  return reading(cost, prompt, ends)


def training_flops(parameters: int, tokens: int) -> int:
  """Returns `6 N D`: forward, and twice that backward."""
  return 6 * parameters * tokens


def break_even(training: float | int, saved: float | int) -> float:
  """Returns the queries after which a verifier's training has paid.

  Args:
    training: FLOPs of making labels and of training the verifier.
    saved: FLOPs that each query saves, at equal accuracy; where it saves none,
      training never pays: infinite.
  """
  return training / saved if saved > 0 else float("inf")
