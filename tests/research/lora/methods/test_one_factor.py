"""LoRA-FA's backward pass: `a` is fixed, so its input is not needed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from research import weights
from research.lora.adapted import AdaptedTensor
from research.lora.method import Place
from research.lora.methods.lora import LoRA
from research.lora.methods.one_factor import LoRAFA
from tests.research.lora.methods import test_methods as laws
from tests.research.lora.methods.test_methods import IN


def test_lora_fa_keeps_no_input_for_the_backward_pass():
  """But for `x aᵀ`: by the shapes that are kept, and by XLA's own count."""
  x, shapes = laws.draw(5, IN), {}
  for method in (LoRA(rank=4), LoRAFA(rank=4)):
    t = laws.one(laws.moved(method))

    def f(trained, x, t=t, method=method):
      w = AdaptedTensor(t.w, trained, t.fixed, method=method)
      return weights.einsum("td,df->tf", x, w)

    _, pull = jax.vjp(f, t.trained, x)
    shapes[type(method)] = [y.shape for y in jax.tree.leaves(pull)]
  assert (5, IN) in shapes[LoRA]
  assert (5, IN) not in shapes[LoRAFA] and (5, 4) in shapes[LoRAFA]

  def layers(method):
    """Returns bytes that a step over 8 layers takes for a while."""
    w = AdaptedTensor(
      jax.ShapeDtypeStruct((8, 256, 256), jnp.float32),
      *jax.eval_shape(
        lambda: method.start(
          jax.random.key(0), Place(256, 256), jnp.zeros((256, 256))
        )
      ),
      method=method,
    )
    lead = functools.partial(jax.tree.map, lambda a: _stack(a, 8))
    w = dataclasses.replace(w, trained=lead(w.trained), fixed=lead(w.fixed))

    def loss(trained, w, x):
      w = dataclasses.replace(w, trained=trained)
      return jnp.sum(jax.lax.scan(_layer, x, w)[0])

    x = jax.ShapeDtypeStruct((2048, 256), jnp.float32)
    done = jax.jit(jax.grad(loss)).lower(w.trained, w, x).compile()
    return done.memory_analysis().temp_size_in_bytes

  # Eight inputs, 2048 x 256 in fp32, of 2 MB each.
  assert layers(LoRA(rank=4)) - layers(LoRAFA(rank=4)) > 7 * 2048 * 256 * 4


def _layer(x, w):
  return weights.einsum("td,df->tf", x, w), None


def _stack(x, n):
  return jax.ShapeDtypeStruct((n, *x.shape), x.dtype)


def test_gradients_are_those_of_lora_with_a_held():
  x, cotangent = laws.draw(2, 5, IN), laws.draw(2, 5, laws.OUT, seed=4)
  t = laws.one(laws.moved(LoRAFA(rank=4)))
  found = {}
  for method in (LoRA(rank=4), LoRAFA(rank=4)):

    def f(b, x, method=method):
      w = AdaptedTensor(t.w, {"b": b}, t.fixed, method=method)
      return weights.einsum("...d,df->...f", x, w)

    y, pull = jax.vjp(f, t.trained["b"], x)
    found[type(method)] = y, *pull(cotangent)
  for got, want in zip(found[LoRAFA], found[LoRA], strict=True):
    laws.close(got, want)
