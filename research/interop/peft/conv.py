"""Adapters on convolutions in PEFT's files, module by module.

PEFT's LoRA has a convolution A like the base's to r channels and one of 1 x 1,
B: reshaped, the factors of the kernel's matrix `[in kh kw, out]`
(`research.nn.conv`). So are LoHa's, and LoKr's but for a second factor that is
whole. `use_effective_conv2d` is another method (Tucker's), and is refused.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from research.lora.method import MatrixSpec, Method
from research.lora.methods.lokr import LoKr
from research.typing import UserError

Tensors = Mapping[str, Shaped[np.ndarray, "..."]]

EFFECTIVE = ("hada_t1", "hada_t2", "lokr_t2")
MAGNITUDE = "lora_magnitude_vector"


def to_peft(
  method: Method, arrays: Any, place: MatrixSpec, window: tuple[int, int]
) -> dict[str, np.ndarray]:
  """Returns the tensors of a convolution by their names behind its own.

  Args:
    method: of the kernel's matrix.
    arrays: all of its arrays.
    place: the matrix.
    window: of the kernel, (kh, kw).

  Raises:
    UserError: PEFT has no such method on convolutions, or the window is not
      the method's or the matrix's.
  """
  method, arrays = method.exported(arrays)
  _check(method, place, window)
  channels = place.size_in // (window[0] * window[1])
  out = {}
  for name, x in method.to_peft(arrays, place).items():
    x = np.asarray(x)
    if name.startswith("lora_A"):
      x = x.reshape(len(x), channels, *window)
    elif name.startswith("lora_B"):
      x = x[:, :, None, None]
    elif name == MAGNITUDE:
      x = x[None, :, None, None]
    elif name == "lokr_w2":
      x = x.reshape(len(x), -1, *window)
    out[name] = x
  return out


def from_peft(
  method: Method,
  tensors: Tensors,
  place: MatrixSpec,
  window: tuple[int, int],
  w: Any,
) -> tuple[Any, Any]:
  """Returns (trained, fixed) of a kernel's matrix; inverts `to_peft`.

  Args:
    method: what the configuration says.
    tensors: of one convolution, by their names behind its own.
    place: the matrix.
    window: of the kernel, (kh, kw).
    w: the matrix itself.

  Raises:
    UserError: the method is another one on convolutions, or the tensors or
      their shapes are not those that `to_peft` has for this kernel.
  """
  _check(method, place, window)
  for name in EFFECTIVE:
    if name in tensors:
      raise UserError(
        f"{name}: found the factors of use_effective_conv2d, which is not"
        " supported.\nExpected an adapter trained with it off."
      )
  flat, shapes = {}, _shapes(method, place, window)
  for name in sorted({*tensors, *shapes}):
    found = np.shape(tensors[name]) if name in tensors else None
    if found != shapes.get(name):
      raise UserError(
        f"{name}: found {_shape_text(found)}, expected"
        f" {_shape_text(shapes.get(name))} of"
        f" {type(method).__name__} of rank {method.rank} on a kernel of"
        f" {window[0]} x {window[1]}, which is a matrix of {place.size_in} x"
        f" {place.size_out}"
      )
  for name, x in tensors.items():
    x = np.asarray(x)
    if name == MAGNITUDE:
      x = x.reshape(-1)
    elif x.ndim > 2:
      x = x.reshape(len(x), -1)
    flat[name] = x
  return method.from_peft(flat, place, w)


def _shape_text(shape: tuple[int, ...] | None) -> str:
  return "no such tensor" if shape is None else f"shape {list(shape)}"


def _shapes(
  method: Method, place: MatrixSpec, window: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the tensors that `to_peft` makes, by name."""
  w = jax.ShapeDtypeStruct((place.size_in, place.size_out), np.float32)
  start = jax.eval_shape(
    lambda w: method.init_arrays(jax.random.key(0), place, w), w
  )
  arrays = {
    name: np.zeros(x.shape, x.dtype)
    for held in start
    for name, x in held.items()
  }
  return {k: x.shape for k, x in to_peft(method, arrays, place, window).items()}


def _check(method: Method, place: MatrixSpec, window: tuple[int, int]) -> None:
  # By name: methods are found by what they are called in files.
  known = ("LORA", "LOHA", "LOKR")
  plain = ("LoRA", "DoRA", "LoHa", "LoKr")
  if method.PEFT not in known or type(method).__name__ not in plain:
    raise UserError(
      f"{type(method).__name__}: PEFT has no such method on convolutions;"
      f" expected one of {', '.join(plain)}, or merge it"
    )
  places = window[0] * window[1]
  if place.size_in % places:
    raise UserError(
      f"window: {window[0]} x {window[1]} places do not divide the"
      f" {place.size_in} inputs of a kernel's matrix"
    )
  if isinstance(method, LoKr) and method.window != places:
    raise UserError(
      f"LoKr.window: found {method.window}, expected {places} of a kernel of"
      f" {window[0]} x {window[1]}"
    )
