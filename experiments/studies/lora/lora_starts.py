"""Times how adapters start on all linear layers of SmolLM2-135M.

  python -m experiments.studies.lora.lora_starts [--method=PiSSA] [--layers=30]

Methods that start from a weight decompose each of its 210 matrices, and some
look at data before. Weights, covariances and gradients are drawn here, of the
model's sizes: what gathering them takes is not in it. Prints seconds of the
clock and of the processor (all its cores) for the first call, which compiles,
and for the second; the last line on stdout is a JSON object.
"""

# ruff: noqa: E402
if __name__ == "__main__":
  from experiments.core import runtime

  runtime.prepare()

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.core import cli
from experiments.studies.lora import lora_methods
from research import tree
from research.lora import adapt, wrap
from research.lora.methods import all_methods
from research.nn import presets
from research.typing import UserError

FLAGS = cli.new_flags()

_METHOD = flags.DEFINE_multi_string(
  "method",
  ["LoRA", "PiSSA", "OLoRA", "CorDA", "LoRAGA"],
  "A method's class; may be given again.",
  flag_values=FLAGS,
)
_LAYERS = flags.DEFINE_integer(
  "layers", lora_methods.SMOLLM2.depth, "Of the model.", flag_values=FLAGS
)

STATISTICS = {"CorDA": "covariance", "LoRAGA": "gradient"}
"""What methods look at."""


def main(argv: Sequence[str]) -> dict[str, Any]:
  """Prints the table."""
  del argv
  known = all_methods()
  for name in _METHOD.value:
    if name not in known:
      raise UserError(f"--method={name}: expected one of {', '.join(known)}")
  sizes = dataclasses.replace(lora_methods.SMOLLM2, depth=_LAYERS.value)
  params, found = drawn(sizes), {}
  for name in _METHOD.value:
    found[name] = timed(name, params)
    times = ", ".join(f"{k} {v:.1f} s" for k, v in found[name].items())
    cli.say(f"{name}: {times}")
  return {"layers": _LAYERS.value, "methods": found}


def timed(name: str, params: Any) -> dict[str, float]:
  """Returns seconds that fresh adapters of a method take, twice."""
  method = all_methods()[name](**lora_methods.OPTIONS.get(name, {}))
  look = None
  if name in STATISTICS:
    look = functools.partial(_statistics, STATISTICS[name])
  transform, out = adapt.Adapt(method=method, init_stats=look), {}
  for call in ("first", "again"):
    clock, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(transform(params, jax.random.key(0)))
    out[call] = round(time.perf_counter() - clock, 2)
    out[f"{call}, processor"] = round(time.process_time() - processor, 2)
  return out


def drawn(sizes: presets.Sizes) -> Any:
  """Returns random parameters of a model's sizes."""
  model = presets.transformer(presets.FAMILIES["llama"], sizes)
  rng, tokens = np.random.default_rng(0), jnp.zeros((1, 2), jnp.int32)
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), tokens)["params"]
  )

  def draw(path, x):
    value = rng.standard_normal(x.shape, np.float32)
    return jnp.asarray(value * x.shape[-2] ** -0.5 if x.ndim > 1 else value)

  return tree.map_paths(draw, shapes)


def _statistics(what, params, paths, key) -> Mapping[str, np.ndarray]:
  del key
  sizes = wrap.matrices(params)
  each = {
    size: _random_statistic(what, size) for size in {sizes[p] for p in paths}
  }
  return {path: each[sizes[path]] for path in paths}


@functools.cache
def _random_statistic(what: str, size: tuple[int, int]) -> np.ndarray:
  """Returns a random gradient, or a covariance that decays as inputs' do."""
  (n, m), rng = size, np.random.default_rng(0)
  if what == "gradient":
    return rng.standard_normal((n, m), np.float32)
  x = rng.standard_normal((2 * n, n), np.float32) / (1 + np.arange(n)) ** 0.5
  return (x.T @ x / (2 * n)).astype(np.float32)


if __name__ == "__main__":
  cli.run(main)
