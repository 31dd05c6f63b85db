"""One call, an implementation for each platform that it may be lowered for.

`jax.lax.platform_dependent` is the same idea, but traces every branch wherever
the program runs: attention's kernels for TPU and GPU are 0.1 to 0.5 s a call,
forward and backward, of a CPU that then lowers neither. Here a kernel is traced
when a program is lowered for its platform, and nowhere else; what a kernel
refuses stops nobody whose program is for another one.

It is a primitive that holds the default's jaxpr, so FLOP counters, shapes and
types that vary over a mesh see that. Its batching rule maps every
implementation. Its tangents are the default's, on all platforms.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from kernels_pallas.common import target_platform

PLATFORMS = ("cpu", "cuda", "tpu")
"""As lowering calls them; others have the default."""

_call = Primitive("by_platform")
_call.multiple_results = True


def by_platform(
  default: Callable[..., Any],
  kernels: Mapping[str, Callable[..., Any]],
  *args: Any,
  note: Callable[[str], None] = lambda platform: None,
) -> Any:
  """Returns what the implementation for the program's platform makes of `args`.

  Args:
    default: Pure; what platforms run that `kernels` does not name. Its jaxpr is
      held, which may not have primitives of JAX's new kind: with
      `jnp.searchsorted` JAX says "is_high=True but no to_lojax lowering rule".
      In `kernels` they do no harm.
    kernels: By platform, one of `PLATFORMS`. Each returns the shapes and dtypes
      that `default` does.
    *args: Pytrees of arrays; all that the implementations depend on.
    note: Called with the platform, each time the call is lowered for one.
  """
  leaves, tree = jax.tree.flatten(args)

  def flat(run):
    return lambda *xs: jax.tree.leaves(run(*jax.tree.unflatten(tree, xs)))

  jaxpr, shapes = jax.make_jaxpr(default, return_shape=True)(*args)
  results = _call.bind(
    *leaves,
    jaxpr=jaxpr,
    kernels=tuple((name, flat(run)) for name, run in kernels.items()),
    note=note,
  )
  return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _implementation(platform, jaxpr, kernels, note):
  """The function over leaves that `platform` runs."""
  note(platform)
  return dict(kernels).get(platform) or jaxpr_as_fun(jaxpr)


@_call.def_impl
def _run(*xs, **params):
  """Without `jit` a program is for where its arrays are."""
  name, _ = target_platform.place_of(xs)
  return _implementation("cuda" if name == "gpu" else name, **params)(*xs)


@_call.def_abstract_eval
def _shapes(*_, jaxpr, **__):
  return jaxpr.out_avals


def _lower(platform):
  def rule(ctx, *xs, **params):
    if platform == "cpu" and ctx.module_context.lowering_parameters.for_export:
      # What CPUs' kernels call is a library of this machine's.
      params["kernels"] = ()
    run = _implementation(platform, **params)
    return mlir.lower_fun(run, multiple_results=True)(ctx, *xs)

  return rule


def _batch(xs, axes, *, jaxpr, kernels, note):
  def mapped(run):
    return jax.vmap(run, in_axes=tuple(axes))

  results = _call.bind(
    *xs,
    jaxpr=jax.make_jaxpr(mapped(jaxpr_as_fun(jaxpr)))(*xs),
    kernels=tuple((name, mapped(run)) for name, run in kernels),
    note=note,
  )
  return results, (0,) * len(results)


def _tangents(xs, tangents, *, jaxpr, kernels, note):
  results = _call.bind(*xs, jaxpr=jaxpr, kernels=kernels, note=note)
  dots = tuple(map(ad.instantiate_zeros, tangents))
  return results, jax.jvp(jaxpr_as_fun(jaxpr), tuple(xs), dots)[1]


batching.primitive_batchers[_call] = _batch
ad.primitive_jvps[_call] = _tangents
mlir.register_lowering(_call, _lower("other"))
for _name in PLATFORMS:
  mlir.register_lowering(_call, _lower(_name), platform=_name)
