"""ONNX's generated attention cases, as stored by `make_attention_onnx.py`.

Differences of contract: ONNX aligns causal masks and windows to the top left
unless there is a past or a length; its boolean masks are biases of -inf here;
a past is put before the keys, as a cache does.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.flash_attention.api import flash_attention
from kernels_pallas.flash_attention.spec import Blocks
from kernels_pallas.flash_attention.tpu.tile_sizes import Tile, Tiles
from tests.support_rounding import assert_no_rougher, in_low_precision

FILE = pathlib.Path(__file__).parents[2] / "golden" / "attention_onnx.npz"
ARRAYS = np.load(FILE, allow_pickle=False)
CASES = json.loads(str(ARRAYS["cases"]))["cases"]

INEXPRESSIBLE = {
  "flexattention_prob_mod": "probabilities that do not sum to 1",
}
"""Features that our contract does not have.

Of cases that also return the product of q and k, or the cache, only the output
is compared.
"""

BACKENDS = {
  "reference": {"backend": "reference"},
  "xla_blockwise": {"backend": "xla_blockwise", "config": Blocks(q=2, k=4)},
  "mosaic_tpu": {
    "backend": "mosaic_tpu", "config": Tiles(*[Tile(4, 8, 4, 8)] * 3),
    "interpret": True},
}  # fmt: skip
CHEAP = ("reference", "xla_blockwise")


def array(spec):
  """Returns an array of the file, in the case's dtype.

  By NumPy, like the whole problem: JAX would compile each step for each shape.
  """
  found = ARRAYS[spec["array"]]
  dtype = np.int32 if spec["dtype"] == "int64" else jnp.dtype(spec["dtype"])
  return found.astype(dtype)


def heads_last(x, heads):
  """[B, N, T, H], or [B, T, N H], to [B, T, N, H]."""
  if x.ndim == 3:
    return x.reshape(*x.shape[:2], heads, -1)
  return x.swapaxes(1, 2)


def score_mod(attributes, T, S):
  """Options and bias of FlexAttention's subgraphs, recognized by name."""
  mod = attributes.get("score_mod", {"name": None})
  name = mod["name"]
  if name == "score_mod_bias":
    return {}, np.full((1,), mod["constants"][0][0])
  if name == "score_mod_causal_mask":
    return {"causal": True}, None
  if name == "score_mod_soft_cap":
    return {"softcap": mod["constants"][0][0]}, None
  if name == "score_mod_relative_positional":
    i, j = np.ogrid[:T, :S]
    return {}, (i - j).astype(np.float32)
  assert name is None
  return {}, None


def bias_of(mask, S):
  """Returns ONNX's mask as a bias over S keys; it may end early."""
  if mask is None:
    return None
  if mask.dtype == bool:
    mask = np.where(mask, np.float32(0), np.float32(-np.inf))
  missing = S - mask.shape[-1]
  widths = [(0, 0)] * (mask.ndim - 1) + [(0, missing)]
  return np.pad(mask, widths, constant_values=-np.inf)


def problem(case):
  """Arrays and static options of a case, in our contract's terms."""
  has = case["attributes"]
  x = {name: array(spec) for name, spec in case["inputs"].items()}
  heads = has.get("q_num_heads"), has.get("kv_num_heads")
  q, k, v = (
    heads_last(x[n], h)
    for n, h in zip("QKV", (heads[0], heads[1], heads[1]), strict=True)
  )
  past = 0
  if "past_key" in x:
    past = x["past_key"].shape[2]
    k = np.concatenate([x["past_key"].swapaxes(1, 2), k], 1)
    v = np.concatenate([x["past_value"].swapaxes(1, 2), v], 1)
  (T, S), lens = (q.shape[1], k.shape[1]), x.get("nonpad_kv_seqlen")
  options, bias = score_mod(has, T, S)
  window = [has.get(f"{side}_window_size", -1) for side in ("left", "right")]
  options |= {
    "causal": bool(has.get("is_causal")) or options.get("causal", False),
    "window": tuple(None if n < 0 else n for n in window),
    "scale": has.get("scale"),
    "softcap": has.get("softcap") or options.get("softcap"),
  }
  arrays = {"q": q, "k": k, "v": v}
  if lens is None:
    options["q_offset"] = past
  else:
    arrays["kv_lens"] = lens
  bias = bias_of(x["attn_mask"], S) if "attn_mask" in x else bias
  if bias is not None:
    arrays["bias"] = bias.astype(np.float32)
  return arrays, options


def kind(case):
  """Returns which attributes and inputs a case has."""
  ignored = {"q_num_heads", "kv_num_heads", "qk_matmul_output_mode"}
  return frozenset(case["attributes"]) - ignored, frozenset(case["inputs"])


# An interpreted kernel is a large program: one case of each kind suffices.
FIRST = {kind(CASES[name]): name for name in reversed(CASES)}


NAMES = [name for name in CASES if name not in INEXPRESSIBLE]


def is_double(name):
  specs = CASES[name]["inputs"].values()
  return "float64" in {spec["dtype"] for spec in specs}


def program(name):
  """Returns the compilation key: shapes and dtypes, and options."""
  arrays, options = problem(CASES[name])
  shapes = {key: (x.shape, x.dtype.name) for key, x in arrays.items()}
  return str(sorted(shapes.items())) + str(sorted(options.items()))


# Many cases differ only in what ONNX returns, or in its layout.
ALIKE = {}
for _name in NAMES:
  ALIKE.setdefault(program(_name), []).append(_name)

# One large program compiles faster than many small ones.
BATCH = 18
SINGLE = [names for names in ALIKE.values() if not is_double(names[0])]
BATCHES = [SINGLE[n : n + BATCH] for n in range(0, len(SINGLE), BATCH)]
BATCHES.append([names for names in ALIKE.values() if is_double(names[0])])


@functools.cache
def computed(batch):
  """Arrays of the queries and results by backend, of each case of a batch."""
  groups = BATCHES[batch]
  problems = {n: problem(CASES[n]) for names in groups for n in names}
  arrays = {name: x for name, (x, _) in problems.items()}

  def alike(names, stacked):
    first = any(FIRST[kind(CASES[name])] == name for name in names)

    def one(x):
      return {
        b: flash_attention(**x, **problems[names[0]][1], **BACKENDS[b])
        for b in (BACKENDS if first else CHEAP)
      }

    if len(names) > 1:
      return jax.lax.map(one, stacked)
    return jax.tree.map(
      lambda o: o[None], one({k: x[0] for k, x in stacked.items()})
    )

  def run(stacks):
    return [alike(*each) for each in zip(groups, stacks, strict=True)]

  fast = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
  }
  stacks = [
    jax.tree.map(lambda *x: np.stack(x), *(arrays[name] for name in names))
    for names in groups
  ]
  with jax.enable_x64(is_double(groups[0][0])):
    done = jax.device_get(jax.jit(run, compiler_options=fast)(stacks))
  found = {
    name: {backend: o[i] for backend, o in results.items()}
    for names, results in zip(groups, done, strict=True)
    for i, name in enumerate(names)
  }
  return arrays, found


HALVES = [
  name for name in NAMES if array(CASES[name]["inputs"]["Q"]).itemsize == 2
]


@functools.cache
def halves():
  """16-bit cases with every step in 16 bits, and in float32."""
  problems = {name: problem(CASES[name]) for name in HALVES}
  arrays = {name: x for name, (x, _) in problems.items()}

  def run(arrays):
    return {
      name: flash_attention(**x, **problems[name][1], backend="reference")
      for name, x in arrays.items()
    }

  def widened(x):
    return x.astype(jnp.float32) if x.itemsize == 2 else x

  return in_low_precision(run, arrays), jax.jit(run)(
    jax.tree.map(widened, arrays)
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.sample(52)
def test_onnx(name):
  alike = ALIKE[program(name)]
  (batch,) = (n for n, groups in enumerate(BATCHES) if alike in groups)
  arrays, found = (x[name] for x in computed(batch))
  with jax.enable_x64(is_double(name)):
    expected = np.asarray(array(CASES[name]["output"]), np.float64)
  if arrays["q"].ndim != np.ndim(expected):
    expected = expected.reshape(found["reference"].shape)
  else:
    expected = expected.swapaxes(1, 2)
  dtype = arrays["q"].dtype
  if name in HALVES:
    # ONNX rounds at every step, as plain attention does: within the rule, too.
    rough, exact = (x[name] for x in halves())
    for o in (expected, *found.values()):
      assert_no_rougher(o, rough, exact, dtype)
    assert all(o.dtype == dtype for o in found.values())
    return
  # Scores of up to 8 products, probabilities, 18 products; inputs are numbers
  # up to 1.
  atol = 8 * float(jnp.finfo(dtype).eps) * max(1, np.abs(expected).max())
  for backend, o in found.items():
    assert o.dtype == dtype
    np.testing.assert_allclose(
      np.asarray(o, np.float64), expected, rtol=0, atol=atol, err_msg=backend
    )


def test_all_onnx_cases_are_covered_or_listed_as_unsupported():
  flex = [name for name in CASES if name.startswith("flex")]
  assert len(flex) == 11 and len(CASES) == 93 + 11
  assert INEXPRESSIBLE.keys() <= CASES.keys() and len(INEXPRESSIBLE) == 1
