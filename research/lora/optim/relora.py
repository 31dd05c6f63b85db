"""ReLoRA: a high-rank change as a sum of low-rank ones.

Lialin et al. 2023 (arXiv:2307.05695). Every `every` updates the adapters are
merged into their base, `a` is drawn anew, `b` is zero again, and the moments of
both are reset; the learning rate climbs again from 0. After k restarts the
base has changed by a matrix of rank up to k r.

The base is `held` in the training state: a rewrite changes it, no gradient
does, and every checkpoint has it. So are the arrays of a method that it does
not learn: they may be of the base, or drawn. A run needs, for weights `w` under
adapters:

  Experiment.trainable = '/trained/'     Experiment.held = '/w$|/fixed/'
  Experiment.rewrites = (@relora.Restart(),)

Any method will do that adds nothing when it starts, and starts from the base
alone: neither KaSA nor LoRA's init 'random', nor what measures inputs or
gradients first (EVA, CorDA, LoRA-GA). A bias that (IA)^3 scales is merged, too:
it has to be held or trained.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research import tree, weights
from research.lora.method import Place
from research.lora.wrap import EMBEDDING, biases, leaves
from research.optim import optim, ranges
from research.training.state import TrainState
from research.typing import Array, Float, PRNGKey, UserError

Metrics = dict[str, Array]
Reset = Callable[[Array, PRNGKey], Array]
"""(moment, key) -> what is left of it."""


def schedule(
  peak: optim.Number,
  steps: int,
  every: int,
  warmup: int,
  rewarm: int,
  final: optim.Number = 0.1,
) -> optim.Schedule:
  """Returns a cosine that climbs again from 0 at each restart.

  As in the authors' code, a climb ends where it meets the cosine. The first
  update of all has rate 0, too.

  Args:
    peak: the highest rate.
    steps: of the whole run; `every` divides them.
    every: updates between restarts.
    warmup: updates of the first climb.
    rewarm: updates of each later one.
    final: the last rate, as a share of `peak`.

  Raises:
    UserError: `every` does not divide `steps`, or a climb is longer than it.
  """
  ranges.non_negative(
    "relora.schedule", peak=peak, warmup=warmup, rewarm=rewarm, final=final
  )
  ranges.positive("relora.schedule", steps=steps, every=every)
  if steps % every or max(warmup, rewarm) > every:
    raise UserError(
      f"relora.schedule: found {steps} steps, restarts every {every}, climbs of"
      f" {warmup} and {rewarm}.\n"
      "Expected `every` to divide the steps, and climbs no longer than it."
    )

  def cosine(count):
    share = (count - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + jnp.cos(math.pi * share))

  def rate(count):
    since, began = count % every, count - count % every
    climb = since / max(1, rewarm) * cosine(began + rewarm)
    later = (since < rewarm) & (count >= every)
    rest = jnp.where(later, climb, cosine(count))
    return peak * jnp.where(count < warmup, count / max(1, warmup), rest)

  return rate


def zero(moment: Array, key: PRNGKey) -> Array:
  """Returns zeros: all is forgotten."""
  del key
  return jnp.zeros_like(moment)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Smallest:
  """Sets the smallest elements of a moment to zero.

  Attributes:
    share: of all elements, those of the least magnitude.
  """

  share: float

  def __post_init__(self):
    ranges.share("Smallest", share=self.share)

  def __call__(self, moment: Array, key: PRNGKey) -> Array:
    """Returns the elements above the quantile of the magnitudes."""
    del key
    size = jnp.abs(moment)
    axes = tuple(range(max(0, moment.ndim - 2), moment.ndim))
    bound = jnp.quantile(size, self.share, axis=axes, keepdims=True)
    return jnp.where(size > bound, moment, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtRandom:
  """Sets elements of a moment to zero, whatever they are.

  Attributes:
    share: of all elements; the authors' own reset is 0.999.
  """

  share: float

  def __post_init__(self):
    ranges.share("AtRandom", share=self.share)

  def __call__(self, moment: Array, key: PRNGKey) -> Array:
    """Returns each element, with the chance `1 - share`, or 0."""
    kept = jax.random.bernoulli(key, 1 - self.share, moment.shape)
    return jnp.where(kept, moment, 0)


def nearest(x: Float[Array, "..."], dtype: Any, key: PRNGKey) -> Array:
  """Returns `x`, rounded to the nearest number of a type."""
  del key
  return x.astype(dtype)


def stochastic(x: Float[Array, "..."], dtype: Any, key: PRNGKey) -> Array:
  """Returns `x`, rounded up or down so that its mean is kept.

  In bfloat16 a change below half a rounding step is lost each time by
  `nearest`; here a share of the elements takes a whole step.

  Args:
    x: float32.
    dtype: float32 (nothing is rounded) or bfloat16.
    key: of the random bits.
  """
  if dtype == jnp.float32:
    return x
  if dtype != jnp.bfloat16:
    raise UserError(
      f"relora.stochastic: found a base of type {jnp.dtype(dtype)}.\n"
      "Expected bfloat16 or float32; use relora.nearest."
    )
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  cut = (bits + noise) & jnp.uint32(0xFFFF0000)
  rounded = jax.lax.bitcast_convert_type(cut, jnp.float32)
  return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restart:
  """Merges and resets the adapters of a training state, every so often.

  A rewrite of `(state, metrics)`, to follow each step. Every weight with
  trainable adapters needs its base `w` in `held`, and what its adapters keep
  fixed. An average of adapters begins again with them.

  Attributes:
    every: updates between restarts.
    until: the first update after which there is none: at the end of a run the
      adapters stay, as they are for a rank law or an export. None for no end.
    after: updates that a restart is late by. 1 is the authors' code, where
      the first of the new cycle's updates, of rate 0, still sees old moments.
    reset: what is left of the moments.
    counts: regular expression of those counters in the optimizer's state that
      begin again at 0, or None. Adam's moments that are reset while its count
      goes on give updates of up to 6.5 times the rate, which is why the rate
      must climb again from 0.
    rounding: of the merged base to its own type.
    seed: of the new `a`.
  """

  every: int
  until: int | None = None
  after: int = 0
  reset: Reset = zero
  counts: str | None = None
  rounding: Callable[[Array, Any, PRNGKey], Array] = nearest
  seed: int = 0

  def __post_init__(self):
    if self.every < 1 or not 0 <= self.after < self.every:
      raise UserError(
        f"Restart: found every {self.every} and after {self.after}.\n"
        "Expected every to be at least 1, and after to be less than every."
      )

  def __call__(
    self, state: TrainState, metrics: Metrics
  ) -> tuple[TrainState, Metrics]:
    """Returns the state, restarted if it is time, and the metrics."""
    since = state.step - self.after
    due = (since % self.every == 0) & (since > 0)
    if self.until is not None:
      due &= state.step < self.until
    key = jax.random.fold_in(jax.random.key(self.seed), state.step)

    def moving(state):
      return state.trainable, state.held, state.opt_state, state.ema

    parts = jax.lax.cond(
      due, lambda: moving(self.restarted(state, key)), lambda: moving(state)
    )
    names = ("trainable", "held", "opt_state", "ema")
    parts = dict(zip(names, parts, strict=True))
    return dataclasses.replace(state, **parts), metrics

  def restarted(self, state: TrainState, key: PRNGKey) -> TrainState:
    """Returns the state with adapters merged, and new ones.

    Args:
      state: where adapters have learned something.
      key: of all that is random.

    Raises:
      UserError: a base that is packed or not held; no adapter, or one that
        cannot begin again.
    """
    new, adapted, scaled = {}, _adapted(state), biases(state.params)
    for path, weight in adapted:
      base = weight.w.astype(jnp.float32)
      total = weights.dense(dataclasses.replace(weight, w=base))
      rounded, drawn = jax.random.split(_key(key, path))
      total = self.rounding(total, weight.w.dtype, rounded)
      new[f"{path}/w"] = total
      new |= _started(path, weight.method, total, drawn)
      name = weights.bias_path(path)
      if name in scaled:
        bias = scaled[name]
        total = bias.matrix.scaled_bias(bias.w.astype(jnp.float32))
        new[name] = self.rounding(total, bias.dtype, _key(key, name))
    _check(new, state)
    adapters = [f"{path}/trained/" for path, _ in adapted]

    def forgotten(path, x):
      mine = any(f"/{a}" in f"/{path}" for a in adapters)
      if mine and x.ndim:
        return self.reset(x, _key(key, path)).astype(x.dtype)
      if self.counts is not None and re.search(self.counts, path):
        return jnp.zeros_like(x)
      return x

    def renewed(path, x):
      return new.get(path, x).astype(x.dtype)

    return dataclasses.replace(
      state,
      trainable=tree.map_paths(renewed, state.trainable),
      held=tree.map_paths(renewed, state.held),
      ema=tree.map_paths(renewed, state.ema),
      opt_state=tree.map_paths(forgotten, state.opt_state),
    )


def _key(key: PRNGKey, path: str) -> PRNGKey:
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _started(path, method, w, key: PRNGKey) -> dict[str, Array]:
  """Returns all arrays of a new adapter by path, stacked as `w` is."""
  *lead, size_in, size_out = w.shape
  place = Place(size_in, size_out, embedding=path == EMBEDDING)
  count = math.prod(lead)
  if not method.starts_as_base:
    raise UserError(
      f"relora: {path}: a new adapter of {type(method).__name__} is not its "
      "base, which would change at each restart.\nExpected a method that adds "
      "nothing when it starts, as LoRA's init 'peft'."
    )

  def one(x):
    trained, fixed = method.start(x[0], place, x[1])
    return {"trained": trained, "fixed": fixed}

  each = jax.random.split(key, count), w.reshape(count, size_in, size_out)
  try:
    found = jax.lax.map(one, each)
  except UserError as e:
    raise UserError(f"relora: {path}: cannot begin again.\n{e}") from e
  return {
    f"{path}/{name}": x.reshape(*lead, *x.shape[1:])
    for name, x in tree.flatten_paths(found)
  }


def _adapted(state: TrainState) -> list[tuple[str, Any]]:
  """Returns (path, weight) of each weight with trainable adapters."""
  trainable = [path for path, _ in tree.flatten_paths(state.trainable)]
  found = []
  for path, leaf in leaves(state.params):
    if not any(p.startswith(f"{path}/trained/") for p in trainable):
      continue
    if not isinstance(leaf.w, jax.Array):
      raise UserError(
        f"relora: the base of {path} is no array but a "
        f"{type(leaf.w).__name__}, which nothing can be merged into.\n"
        "Expected a base that is neither packed nor adapted."
      )
    found.append((path, leaf))
  if not found:
    raise UserError(
      "relora: no weight has trainable adapters.\n"
      "Expected `trainable` to match them: '/trained/'."
    )
  return found


def _check(new: Mapping[str, Array], state: TrainState) -> None:
  """Raises UserError unless the state can hold all that is new."""
  moving = tree.flatten_paths((state.trainable, state.held))
  known = {path.partition("/")[2] for path, _ in moving}
  for path in new:
    if path not in known:
      raise UserError(
        f"relora: {path} is neither trained nor held, and would stay what it "
        "was of the old base.\nExpected Experiment.held to match every adapted "
        "base, what its adapters keep fixed, and biases that they scale: "
        "'/w$|/fixed/', and '_bias$' where there are any."
      )
