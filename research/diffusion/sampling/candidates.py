"""What a sampling step proposes for each place, and how sure it is of it."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from research.diffusion.sampling.policies import Policy, Quota, shares_of
from research.diffusion.sampling.remask import Remask
from research.diffusion.schedule import Linear
from research.generation import sampling as samplers
from research.generation.sampling import Sampling
from research.typing import Array, Bool, Float, Int, PRNGKey, UserError

Select = Literal["candidate", "max", "margin", "entropy", "random"]
Plan = Literal["even", "dream", "linear", "cosine", "chance"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How rows are filled; all of it is static.

  Attributes:
    mask_id: of the mask, which is never a candidate.
    length: how many tokens are generated, a multiple of `block`.
    block: tokens of a block; `length` for pure diffusion.
    steps: of all blocks together, for policies with a quota; None for a
      token a step.
    plan: how many places the steps of a block fill, for policies with a quota,
      see `policies.shares_of`. `"chance"`, with `select="random"`, is
      ancestral sampling: each place left is filled by chance, as likely as the
      linear schedule has it.
    policy: which candidates are kept.
    select: what confidence is: the candidate's probability (LLaDA's
      `low_confidence`; biased for temperatures above 0), or what does not
      depend on the candidate: the largest probability, the margin between the
      two largest, minus the entropy, or chance. A policy that compares it with
      a probability needs one of the first three; a margin is at most the
      probability, so it is as safe.
    place_temperature: of choosing places: confidences divided by it are the
      logits of draws without replacement (Dream's `alg_temp`), for policies
      that only rank them; None for the surest.
    tempered: whether confidence is taken from the distribution that is
      sampled, filters included (LLaDA 2), not from the model's.
    end: token ids that end a text.
    never_end: no candidate is one of them.
    end_last: places whose candidate is one of them are filled last.
    stop: rows whose finished part holds an end are done; the rest is it.
    edit: places already filled change where another token is this likely
      (LLaDA 2.1), or None.
    edit_steps: at most so many more calls for a row once its block is full.
    remask: how likely places filled by chance are masked again (ReMDM), or
      None. More `steps` than places then mend what was filled wrongly.
  """

  mask_id: int
  length: int = 128
  block: int = 32
  steps: int | None = None
  plan: Plan = "even"
  policy: Policy = Quota()
  select: Select = "candidate"
  place_temperature: float | None = None
  tempered: bool = False
  end: tuple[int, ...] = ()
  never_end: bool = False
  end_last: bool = False
  stop: bool = True
  edit: float | None = None
  edit_steps: int = 16
  remask: Remask | None = None

  def __post_init__(self):
    if self.length < 1 or self.block < 1 or self.length % self.block:
      raise UserError(
        f"sampler: length is {self.length}, expected a multiple of block, "
        f"{self.block}"
      )
    blocks = self.length // self.block
    if self.steps is not None and (self.steps < 1 or self.steps % blocks):
      raise UserError(
        f"sampler: steps is {self.steps}, expected a multiple of the {blocks} "
        "blocks"
      )
    if self.mask_id in self.end:
      raise UserError(f"sampler: end holds the mask's id, {self.mask_id}")
    self._check_chance()
    self._check_policy()

  def _check_policy(self) -> None:
    """Raises UserError for what the policy would not heed, or misread."""
    policy, name = self.policy, type(self.policy).__name__
    if policy.needs_probabilities and self.select in ("entropy", "random"):
      raise UserError(
        f"sampler: select is {self.select} and policy {name}, expected "
        "candidate, max or margin: the policy compares confidences with a "
        "probability; or the policy Quota, which only ranks them"
      )
    for field, plain in (("steps", None), ("plan", "even")):
      value = getattr(self, field)
      if value != plain and not policy.uses_quota:
        raise UserError(
          f"sampler: {field} is {value} and policy {name}, expected Quota, or "
          f"{field} {plain}: the policy takes as many steps as it needs"
        )
    if self.place_temperature is None:
      return
    if not self.place_temperature > 0:
      raise UserError(
        f"sampler: place_temperature is {self.place_temperature}, expected "
        "more than 0, or None"
      )
    if policy.needs_probabilities:
      raise UserError(
        f"sampler: place_temperature is {self.place_temperature} and policy "
        f"{name}, expected Quota: confidences divided by it are no "
        "probabilities any more"
      )
    if self.select == "random":
      raise UserError(
        f"sampler: place_temperature is {self.place_temperature} and select "
        "random, expected another select, or None: places are drawn anyway"
      )

  def _check_chance(self) -> None:
    """Raises UserError for what places that are filled by chance exclude."""
    if self.plan == "chance" and self.select != "random":
      raise UserError(
        f"sampler: plan is chance and select {self.select}, expected random: "
        "ancestral sampling fills any place as likely as another"
      )
    if self.plan == "chance" and not isinstance(self.policy, Quota):
      raise UserError(
        f"sampler: plan is chance and policy {type(self.policy).__name__}, "
        "expected Quota: how many places are filled is drawn, not judged"
      )
    if self.remask is not None and self.plan != "chance":
      raise UserError(
        f"sampler: remask is {self.remask} and plan {self.plan}, expected "
        "chance: what is masked again has to be filled by chance in turn"
      )

  @property
  def block_steps(self) -> int:
    """Returns the steps planned for a block."""
    if self.steps is None:
      return self.block
    return self.steps // (self.length // self.block)

  @property
  def of_block(self) -> "Options":
    """Returns these for a block alone: rows of all lengths share a program."""
    steps = None if self.steps is None else self.block_steps
    return dataclasses.replace(self, length=self.block, steps=steps)

  def quota(
    self,
    planned: Int[Array, "B"],
    left: Int[Array, "B"],
    i: Int[Array, ""] | int,
    keys: PRNGKey | None = None,
  ) -> Int[Array, "B"]:
    """Returns how many places each row fills by plan.

    Args:
      planned: masks that a block had at first.
      left: those that it has.
      i: steps of this block so far.
      keys: of the rows, for this step; for `"chance"`.
    """
    steps = self.block_steps
    if self.plan == "even":
      return planned // steps + (i < planned % steps)
    shares = jnp.asarray(shares_of(self.plan, steps), jnp.float32)
    share = shares[jnp.minimum(i, steps - 1)]
    if self.remask is not None:
      fill = self.remask.fills(Linear(), *self._times(i))
      share = jnp.where(i < steps - 1, fill, 1.0)
    if self.plan == "chance":
      # So many of K coins as places are left.
      hit = (self._lots(keys, 2) < share) & (
        jnp.arange(self.block) < left[:, None]
      )
      return hit.sum(-1, dtype=jnp.int32)
    some = left * share
    some = jnp.floor(some) if self.plan == "dream" else jnp.round(some)
    return jnp.where(i < steps - 1, some.astype(jnp.int32), left)

  def again(
    self,
    sure: Float[Array, "B K"],
    filled: Bool[Array, "B K"],
    i: Int[Array, ""] | int,
    keys: PRNGKey,
  ) -> Bool[Array, "B K"]:
    """Returns which filled places are masked again, by `remask`.

    Args:
      sure: how probable a place's token was when it was filled in.
      filled: which places of the block may be masked again.
      i: steps of this block so far.
      keys: of the rows, for this step.
    """
    if self.remask is None:
      return jnp.zeros_like(filled)
    sigma = self.remask.sigma(Linear(), *self._times(i), sure, filled)
    return filled & (self._lots(keys, 3) < sigma) & (i < self.block_steps - 1)

  def _lots(self, keys: PRNGKey, use: int) -> Float[Array, "B K"]:
    """Returns a uniform number for each place, others for each use."""

    def draw(key):
      return jax.random.uniform(jax.random.fold_in(key, use), (self.block,))

    return jax.vmap(draw)(keys)

  def _times(self, i) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the process's times before and after step `i` of a block."""
    t = 1 - jnp.float32(i) / self.block_steps
    return t, jnp.maximum(t - 1 / self.block_steps, 0.0)


def candidates(
  logits: Float[Array, "B K V"],
  keys: PRNGKey,
  options: Options,
  sampling: Sampling,
) -> tuple[Int[Array, "B K"], Float[Array, "B K"], Float[Array, "B K"]]:
  """Returns each place's candidate, its confidence, and its probability.

  Args:
    logits: of the places.
    keys: of the rows, for this step.
    options, sampling: as for `sample`.
  """
  logits = logits.astype(jnp.float32)
  never = (options.mask_id, *(options.end if options.never_end else ()))
  logits = logits.at[..., jnp.array(never)].set(-jnp.inf)
  rows, size, vocabulary = logits.shape
  flat = samplers.process_logits(logits.reshape(-1, vocabulary), sampling)
  drawn = flat.reshape(logits.shape)
  noise, chance = jax.vmap(jax.random.split, out_axes=1)(keys)
  if sampling.temperature is None:
    found = jnp.argmax(drawn, axis=-1)
  else:
    # Of full 32 bits Gumbel noise has no tail beyond 16, as if the temperature
    # were lower (Zheng et al. 2024, arXiv:2409.02908).
    gumbel = jax.vmap(
      lambda k: jax.random.gumbel(k, (size, vocabulary), mode="high")
    )(noise)
    found = jnp.argmax(drawn + gumbel, axis=-1)
  logp = jax.nn.log_softmax(drawn if options.tempered else logits, axis=-1)
  own = jnp.take_along_axis(logp, found[..., None], axis=-1)[..., 0]
  probability = jnp.exp(own)
  sure = _confidence(logp, probability, chance, options.select)
  if options.place_temperature is not None:
    places = jax.vmap(lambda k: jax.random.fold_in(k, 1))(chance)
    draw = jax.vmap(lambda k: jax.random.gumbel(k, (size,), mode="high"))
    sure = sure / options.place_temperature + draw(places)
  # A model that is broken is said to be so after the block.
  sure = jnp.where(jnp.isnan(sure), -1.0, sure)
  if options.end_last and options.end:
    ends = jnp.isin(found, jnp.array(options.end))
    # Lower than any confidence, but finite: last, not never.
    sure = jnp.where(ends, jnp.minimum(sure.min() - 1, -1.0), sure)
  return found.astype(jnp.int32), sure, probability


def _confidence(logp, probability, keys, select: Select):
  if select == "candidate":
    return probability
  if select == "max":
    return jnp.exp(logp.max(-1))
  if select == "margin":
    top = jax.lax.top_k(jnp.exp(logp), 2)[0]
    return top[..., 0] - top[..., 1]
  if select == "entropy":
    p = jnp.exp(logp)
    return jnp.where(p > 0, p * logp, 0).sum(-1)
  draw = jax.vmap(lambda k: jax.random.uniform(k, probability.shape[1:]))
  return draw(keys)
