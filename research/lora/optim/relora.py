"""ReLoRA: high-rank training by repeatedly merging and restarting LoRA.

Lialin et al. 2023 (arXiv:2307.05695). Every `every` updates the adapters are
merged into their base, `a` is reinitialised, `b` is set to zero and the moments
of both are reset; the learning rate warms up again from 0. After k restarts the
base has changed by a matrix of rank up to k r.

The base is `transformed` in the training state: `Restart` changes it, gradients
do not, and every checkpoint contains it. The same holds for a method's fixed
arrays, which may depend on the base or be random. A run needs, for weights `w`
under adapters:

  Experiment.trainable = '/trained/'
  Experiment.transformed = '/w$|/fixed/'
  Experiment.state_transforms = (@relora.Restart(),)

Any method works whose new adapter leaves outputs unchanged and whose
initialisation needs the base alone: neither KaSA nor LoRA's init 'random', nor
methods that need calibration (EVA, CorDA, LoRA-GA). A bias that (IA)^3 scales
is merged too, and must be transformed or trained.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from research import ranges, tree, weights
from research.lora.method import MatrixSpec
from research.lora.wrap import biases, is_embedding, leaves
from research.optim import optim
from research.ranges import PositiveInt, Ranged, Share
from research.training.state import TrainState
from research.typing import Array, Float, PRNGKey, UserError

Metrics = dict[str, Array]
Reset = Callable[[Array, PRNGKey], Array]
"""(moment, key) -> the reset moment."""


def schedule(
  peak: optim.Number,
  steps: int,
  every: int,
  warmup: int,
  rewarm: int,
  final: optim.Number = 0.1,
) -> optim.Schedule:
  """Returns a cosine schedule with a warmup from 0 after each restart.

  As in the authors' code, a warmup ends where it meets the cosine. The run's
  first update has rate 0, too.

  Args:
    steps: updates of the whole run; a multiple of `every`.
    every: updates between restarts.
    final: last learning rate, as a share of `peak`.

  Raises:
    UserError: `every` does not divide `steps`, or a warmup is longer than it.
  """
  ranges.check(
    "relora.schedule",
    ranges.NonNegativeFloat,
    peak=peak,
    warmup=warmup,
    rewarm=rewarm,
    final=final,
  )
  ranges.check(
    "relora.schedule", ranges.PositiveFloat, steps=steps, every=every
  )
  if steps % every or max(warmup, rewarm) > every:
    raise UserError(
      f"relora.schedule: found {steps} steps, restarts every {every}, warmups"
      f" of {warmup} and {rewarm}.\n"
      "Expected `every` to divide the steps, and warmups no longer than it."
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
  """Resets a moment to zeros."""
  del key
  return jnp.zeros_like(moment)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagnitudePruning(Ranged):
  """Sets a moment's elements of least magnitude to zero.

  Attributes:
    share: share of all elements that are set to zero.
  """

  share: Share

  def __call__(self, moment: Array, key: PRNGKey) -> Array:
    del key
    size = jnp.abs(moment)
    axes = tuple(range(max(0, moment.ndim - 2), moment.ndim))
    bound = jnp.quantile(size, self.share, axis=axes, keepdims=True)
    return jnp.where(size > bound, moment, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomPruning(Ranged):
  """Sets random elements of a moment to zero.

  Attributes:
    share: probability of an element; the authors use 0.999.
  """

  share: Share

  def __call__(self, moment: Array, key: PRNGKey) -> Array:
    kept = jax.random.bernoulli(key, 1 - self.share, moment.shape)
    return jnp.where(kept, moment, 0)


def nearest(x: Float[Array, "..."], dtype: Any, key: PRNGKey) -> Array:
  """Returns `x` rounded to the nearest number of `dtype`."""
  del key
  return x.astype(dtype)


def stochastic(x: Float[Array, "..."], dtype: Any, key: PRNGKey) -> Array:
  """Returns `x` stochastically rounded, which preserves its expectation.

  `nearest` loses every change below half a bfloat16 ulp; here a share of the
  elements moves by a whole ulp.

  Args:
    x: float32.
    dtype: bfloat16, or float32, which rounds nothing.

  Raises:
    UserError: another dtype.
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
class Restart(Ranged):
  """Periodically merges the adapters into the base and reinitialises them.

  A state transform `(state, metrics) -> (state, metrics)`, applied after each
  step. The base `w` and the fixed arrays of every trained adapter must be in
  `transformed`. A moving average of the adapters restarts with them.

  Attributes:
    every: updates between restarts.
    until: first update without restarts, so that the adapters of the last
      cycle stay for diagnosis or export; None for no end.
    after: number of updates by which a restart is delayed. 1 matches the
      authors' code, where the first update of a new cycle, of rate 0, still
      uses the old moments.
    reset: resets a moment, such as `zero` or `MagnitudePruning`.
    counts: regular expression of the counters in the optimizer's state that
      are reset to 0, or None. Resetting Adam's moments but not its count gives
      updates of up to 6.5 times the learning rate, which is why the rate must
      warm up again from 0.
    rounding: rounds the merged base to its dtype.
  """

  every: PositiveInt
  until: int | None = None
  after: int = 0
  reset: Reset = zero
  counts: str | None = None
  rounding: Callable[[Array, Any, PRNGKey], Array] = nearest
  seed: int = 0

  def __post_init__(self):
    super().__post_init__()
    self.expect("after", 0, self.every - 1)

  def __call__(
    self, state: TrainState, metrics: Metrics
  ) -> tuple[TrainState, Metrics]:
    since = state.step - self.after
    due = (since % self.every == 0) & (since > 0)
    if self.until is not None:
      due &= state.step < self.until
    key = jax.random.fold_in(jax.random.key(self.seed), state.step)

    def moving(state):
      return state.trainable, state.transformed, state.opt_state, state.ema

    parts = jax.lax.cond(
      due, lambda: moving(self.restart(state, key)), lambda: moving(state)
    )
    names = ("trainable", "transformed", "opt_state", "ema")
    parts = dict(zip(names, parts, strict=True))
    return dataclasses.replace(state, **parts), metrics

  def restart(self, state: TrainState, key: PRNGKey) -> TrainState:
    """Returns the state with its adapters merged and reinitialised.

    Args:
      key: key of the initialisation, the resets and the rounding.

    Raises:
      UserError: a base is packed or not transformed, there is no adapter, a
        method cannot be reinitialised, or the optimizer's state reset.
    """
    new, adapted, scaled = {}, _adapted(state), biases(state.params)
    for path, weight in adapted:
      base = weight.w.astype(jnp.float32)
      total = weights.dense(dataclasses.replace(weight, w=base))
      rounded, drawn = jax.random.split(_key(key, path))
      total = self.rounding(total, weight.w.dtype, rounded)
      new[f"{path}/w"] = total
      new |= _new_arrays(path, weight.method, total, drawn)
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
        self._check_moment(path, x)
        return self.reset(x, _key(key, path)).astype(x.dtype)
      if self.counts is not None and re.search(self.counts, path):
        return jnp.zeros_like(x)
      return x

    def renewed(path, x):
      return new.get(path, x).astype(x.dtype)

    return dataclasses.replace(
      state,
      trainable=tree.map_paths(renewed, state.trainable),
      transformed=tree.map_paths(renewed, state.transformed),
      ema=tree.map_paths(renewed, state.ema),
      opt_state=tree.map_paths(forgotten, state.opt_state),
    )

  def _check_moment(self, path: str, x: Array) -> None:
    if re.search(r"(^|/)z/", path):
      raise UserError(
        f"relora: {path} is an iterate of schedule-free, not a moment, and must"
        " not be reset.\nExpected another optimizer, such as optim.adamw."
      )
    if x.dtype == jnp.bool_:
      raise UserError(
        f"relora: {path} is a mask, such as AdaLoRA's, not a moment; a reset"
        " would remove all terms.\nExpected an optimizer without one."
      )
    prunes = isinstance(self.reset, MagnitudePruning | RandomPruning)
    if prunes and jnp.issubdtype(x.dtype, jnp.integer):
      raise UserError(
        f"relora: {path} has quantized moments, whose code 0 is not 0.0.\n"
        "Expected moments in 32 bits, or reset = @relora.zero."
      )


def _key(key: PRNGKey, path: str) -> PRNGKey:
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _new_arrays(path, method, w, key: PRNGKey) -> dict[str, Array]:
  *lead, size_in, size_out = w.shape
  spec = MatrixSpec(size_in, size_out, embedding=is_embedding(path))
  count = math.prod(lead)
  if not method.starts_as_base:
    raise UserError(
      f"relora: {path}: a new adapter of {type(method).__name__} changes the "
      "model's outputs, at each restart.\nExpected a method whose update "
      "starts at zero, such as LoRA with init 'peft'."
    )

  def one(x):
    trained, fixed = method.init_arrays(x[0], spec, x[1])
    return {"trained": trained, "fixed": fixed}

  each = jax.random.split(key, count), w.reshape(count, size_in, size_out)
  try:
    arrays = jax.lax.map(one, each)
  except UserError as e:
    raise UserError(f"relora: {path}: cannot be reinitialised.\n{e}") from e
  return {
    f"{path}/{name}": x.reshape(*lead, *x.shape[1:])
    for name, x in tree.flatten_paths(arrays)
  }


def _adapted(state: TrainState) -> list[tuple[str, Any]]:
  """Returns (path, weight) of each weight with trainable adapters."""
  trainable = [path for path, _ in tree.flatten_paths(state.trainable)]
  adapted = []
  for path, leaf in leaves(state.params):
    if not any(p.startswith(f"{path}/trained/") for p in trainable):
      continue
    if not isinstance(leaf.w, jax.Array):
      raise UserError(
        f"relora: the base of {path} is a {type(leaf.w).__name__}, into which "
        "nothing can be merged.\n"
        "Expected an array: a base that is neither quantized nor adapted."
      )
    adapted.append((path, leaf))
  if not adapted:
    raise UserError(
      "relora: no weight has trainable adapters.\n"
      "Expected `trainable` to match them: '/trained/'."
    )
  return adapted


def _check(new: Mapping[str, Array], state: TrainState) -> None:
  """Raises UserError for an array that is neither trained nor transformed."""
  moving = tree.flatten_paths((state.trainable, state.transformed))
  known = {path.partition("/")[2] for path, _ in moving}
  for path in new:
    if path not in known:
      raise UserError(
        f"relora: {path} is neither trained nor transformed, so a restart "
        "cannot update it.\nExpected Experiment.transformed to match every "
        "adapted base, its adapters' fixed arrays, and biases that they scale: "
        "'/w$|/fixed/', and '_bias$' where there are any."
      )
