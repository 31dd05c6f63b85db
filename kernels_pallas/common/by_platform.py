"""`by_platform`: one call with a separate implementation for each platform.

`jax.lax.platform_dependent` has the same purpose, but traces every branch on
every platform: tracing the TPU and GPU attention kernels, forward and backward,
costs a CPU program 0.1 to 0.5 s per call although it lowers neither. Here a
kernel is traced only when a program is lowered for its platform, so a kernel
that refuses a call does not affect programs for other platforms.

The call is a JAX primitive that carries the default's jaxpr: FLOP counters,
shapes and varying mesh axes come from it. Batching maps every implementation.
Forward-mode derivatives are the default's, on all platforms.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from kernels_pallas.common import target_platform

PLATFORMS = ("cpu", "cuda", "tpu")
"""Platform names as in lowering; all others run the default."""

_call = Primitive("by_platform")
_call.multiple_results = True


def by_platform(
  default: Callable[..., Any],
  kernels: Mapping[str, Callable[..., Any]],
  *args: Any,
  on_lowering: Callable[[str], None] = lambda platform: None,
) -> Any:
  """Calls the implementation for the platform that the program is lowered for.

  Args:
    default: A pure function, run on platforms missing from `kernels`. Its jaxpr
      must not contain JAX's new-style primitives: with `jnp.searchsorted` JAX
      raises "is_high=True but no to_lojax lowering rule". `kernels` may contain
      them.
    kernels: Implementations by platform, a subset of `PLATFORMS`. Each returns
      the same shapes and dtypes as `default`.
    *args: Pytrees of arrays; the implementations depend on nothing else.
    on_lowering: Called with the platform each time the call is lowered.
  """
  leaves, tree = jax.tree.flatten(args)

  def flat(run):
    return lambda *xs: jax.tree.leaves(run(*jax.tree.unflatten(tree, xs)))

  jaxpr, shapes = jax.make_jaxpr(default, return_shape=True)(*args)
  results = _call.bind(
    *leaves,
    jaxpr=jaxpr,
    kernels=tuple((name, flat(run)) for name, run in kernels.items()),
    on_lowering=on_lowering,
  )
  return jax.tree.unflatten(jax.tree.structure(shapes), results)


def _implementation(platform, jaxpr, kernels, on_lowering):
  """Returns the function over flat leaves that `platform` runs."""
  on_lowering(platform)
  return dict(kernels).get(platform) or jaxpr_as_fun(jaxpr)


@_call.def_impl
def _run(*xs, **params):
  """Without `jit`, the platform is that of the arguments' device."""
  name, _ = target_platform.device_of_arrays(xs)
  return _implementation("cuda" if name == "gpu" else name, **params)(*xs)


@_call.def_abstract_eval
def _shapes(*_, jaxpr, **__):
  return jaxpr.out_avals


def _lower(platform):
  def rule(ctx, *xs, **params):
    if platform == "cpu" and ctx.module_context.lowering_parameters.for_export:
      # CPU kernels call a shared library that exists on this machine only.
      params["kernels"] = ()
    run = _implementation(platform, **params)
    return mlir.lower_fun(run, multiple_results=True)(ctx, *xs)

  return rule


def _batch(xs, axes, *, jaxpr, kernels, on_lowering):
  def mapped(run):
    return jax.vmap(run, in_axes=tuple(axes))

  results = _call.bind(
    *xs,
    jaxpr=jax.make_jaxpr(mapped(jaxpr_as_fun(jaxpr)))(*xs),
    kernels=tuple((name, mapped(run)) for name, run in kernels),
    on_lowering=on_lowering,
  )
  return results, (0,) * len(results)


def _tangents(xs, tangents, *, jaxpr, kernels, on_lowering):
  results = _call.bind(
    *xs, jaxpr=jaxpr, kernels=kernels, on_lowering=on_lowering
  )
  dots = tuple(map(ad.instantiate_zeros, tangents))
  return results, jax.jvp(jaxpr_as_fun(jaxpr), tuple(xs), dots)[1]


batching.primitive_batchers[_call] = _batch
ad.primitive_jvps[_call] = _tangents
mlir.register_lowering(_call, _lower("other"))
for _name in PLATFORMS:
  mlir.register_lowering(_call, _lower(_name), platform=_name)
