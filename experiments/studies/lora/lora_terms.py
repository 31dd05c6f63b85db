"""What methods add to the loss, as gradients beside those of the data.

A study has one objective for all arms, and measures with it; what one method
minimises besides depends on its own arrays alone, so its gradient is added
where the optimizer gets that of the mean loss: the same updates as from a loss
that contains it.

  orthogonal   0.5 (mean over a and b of all matrices of ‖x xᵀ - 1‖)
               AdaLoRA's, arXiv:2303.10512, in PEFT's form
  kasa         sum over matrices of β ‖d‖² + γ (‖a aᵀ - 1‖ + ‖b bᵀ - 1‖)
               arXiv:2412.06071, equations 9 to 12, as PEFT sums them
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from research import weights
from research.lora import allocate
from research.lora.methods.kasa import KaSA
from research.typing import Array, UserError

Term = Callable[[Any], Array]
"""The trained part of a tree of parameters -> a scalar that is minimised."""


def add_gradient(
  term: Term, inner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
  """Returns `inner` of the gradients of the loss and `term`.

  Args:
    term: what is minimised besides.
    inner: makes the updates.
  """
  inner = optax.with_extra_args_support(inner)

  def update(updates, state, params=None, **extra):
    if params is None:
      raise ValueError("lora_terms: the update needs the parameters")
    more = jax.grad(term)(params)
    updates = jax.tree.map(lambda g, m: g + m.astype(g.dtype), updates, more)
    return inner.update(updates, state, params, **extra)

  return optax.GradientTransformationExtraArgs(inner.init, update)


def orthogonal(params: Any) -> Array:
  """Returns AdaLoRA's term, weighed as `allocate.Orthogonal` does."""
  return allocate.Orthogonal.weight * allocate.orthogonality(params)


def kasa(params: Any) -> Array:
  """Returns KaSA's terms.

  Args:
    params: with KaSA's adapters; what is not trained may be missing.

  Raises:
    UserError: there are none.
  """
  found = [
    leaf
    for leaf in jax.tree.leaves(params, is_leaf=weights.is_weight)
    if isinstance(getattr(leaf, "method", None), KaSA)
  ]
  if not found:
    raise UserError("lora_terms: no KaSA adapter among the parameters")
  total = jnp.zeros((), jnp.float32)
  for leaf in found:
    a, b, d = (leaf.trained[name] for name in "abd")
    total += leaf.method.beta * jnp.sum(jnp.square(d))
    total += leaf.method.gamma * (_off(a) + _off(b))
  return total


def _off(x: Array) -> Array:
  """Returns the sum over matrices of ‖x xᵀ - 1‖."""
  gram = jnp.einsum("...rn,...sn->...rs", x, x) - jnp.eye(x.shape[-2])
  square = jnp.sum(jnp.square(gram), (-2, -1))
  # The gradient of a root at 0 is no number.
  return jnp.sum(jnp.sqrt(jnp.maximum(square, jnp.finfo(x.dtype).tiny)))
