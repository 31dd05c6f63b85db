"""flash-attention's rule, the only tolerance of 16 bits.

kernels_pallas/MATH.md 8 has it. A kernel's error may be at most twice that of
plain attention with every step in the same 16 bits, plus twice the rounding of
numbers near the result: the rule is scale-free, and its limit is measured.
"""

import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.decode_attention import api as decode_api
from kernels_pallas.decode_attention import reference as decode_reference
from kernels_pallas.flash_attention import reference

DEFINITIONS = (reference, decode_reference, decode_api)
"""Modules in which the references choose the accumulation dtype."""


def in_low_precision(f, *args):
  """Calls `f(*args)` with the reference accumulating in its operands' dtype.

  Args:
    f: Calls `flash_attention`, or decoding, with backend='reference'; not
      jitted before, since its cached trace would be used.
    *args: Its arguments.
  """
  # XLA would keep a chain of steps in float32, and round once.
  strict = {"xla_allow_excess_precision": False}
  with contextlib.ExitStack() as patches:
    for module in DEFINITIONS:
      patch = mock.patch.object(module, "accumulator", lambda dtype: dtype)
      patches.enter_context(patch)
    return jax.jit(lambda *x: f(*x), compiler_options=strict)(*args)


def assert_no_rougher(found, rough, exact, dtype):
  """Asserts the rule for every array of a tree.

  Args:
    found: Results under test, in any dtype.
    rough: Results of `in_low_precision`.
    exact: Results in float32 or wider.
    dtype: Dtype of the operands.
  """
  wide, dtype = lambda x: np.asarray(x, np.float64), jnp.dtype(dtype)
  flat, tree = jax.tree.flatten_with_path(found)
  others = tree.flatten_up_to(rough), tree.flatten_up_to(exact)
  for (path, have), plain, truth in zip(flat, *others, strict=True):
    have, plain, truth = wide(have), wide(plain), wide(truth)
    # By NumPy, in one dtype throughout: JAX would compile it for each shape.
    rounded, offset = truth.astype(dtype), np.asarray(0.3, dtype)
    near = rounded + offset - offset
    assert near.dtype == dtype
    limit = 2 * np.abs(plain - truth).max()
    limit += 2 * np.abs(wide(near) - wide(rounded)).max()
    error = np.abs(have - truth).max()
    assert error <= limit, (jax.tree_util.keystr(path), error, limit)
