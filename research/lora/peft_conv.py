"""Adapters on convolutions in PEFT's files, module by module.

PEFT's LoRA has a convolution A like the base's to r channels and one of 1 x 1,
B: reshaped, the factors of the kernel's matrix `[in kh kw, out]`
(`research.nn.conv`). So are LoHa's, and LoKr's but for a second factor that is
whole. `use_effective_conv2d` is another method (Tucker's), and is refused.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from research.lora.method import Method, Place
from research.typing import UserError

Tensors = Mapping[str, Shaped[np.ndarray, "..."]]

EFFECTIVE = ("hada_t1", "hada_t2", "lokr_t2")
MAGNITUDE = "lora_magnitude_vector"


def to_peft(
  method: Method, arrays: Any, place: Place, window: tuple[int, int]
) -> dict[str, np.ndarray]:
  """Returns the tensors of a convolution by their names behind its own.

  Args:
    method: of the kernel's matrix.
    arrays: all of its arrays.
    place: the matrix.
    window: of the kernel, (kh, kw).

  Raises:
    UserError: PEFT has no such method on convolutions.
  """
  method, arrays = method.exported(arrays)
  _check(method)
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
  method: Method, tensors: Tensors, place: Place, w: Any
) -> tuple[Any, Any]:
  """Returns (trained, fixed) of a kernel's matrix; inverts `to_peft`.

  Args:
    method: what the configuration says.
    tensors: of one convolution, by their names behind its own.
    place: the matrix.
    w: the matrix itself.

  Raises:
    UserError: the method is another one on convolutions, or a shape is not
      of this kernel.
  """
  _check(method)
  for name in EFFECTIVE:
    if name in tensors:
      raise UserError(
        f"{name}: found the factors of use_effective_conv2d, which is not"
        " supported.\nExpected an adapter trained with it off."
      )
  flat = {}
  for name, x in tensors.items():
    x = np.asarray(x)
    if name == MAGNITUDE:
      x = x.reshape(-1)
    elif x.ndim > 2:
      x = x.reshape(len(x), -1)
    flat[name] = x
  for name, size in (("lora_A.weight", place.size_in),):
    if name in flat and flat[name].shape[1] != size:
      raise UserError(
        f"{name}: has shape {list(tensors[name].shape)}, expected"
        f" {size} numbers for each of its rows, as the kernel has"
      )
  return method.from_peft(flat, place, w)


def _check(method: Method) -> None:
  # By name: methods are found by what they are called in files.
  known = ("LORA", "LOHA", "LOKR")
  plain = ("LoRA", "DoRA", "LoHa", "LoKr")
  if method.PEFT not in known or type(method).__name__ not in plain:
    raise UserError(
      f"{type(method).__name__}: PEFT has no such method on convolutions;"
      f" expected one of {', '.join(plain)}, or merge it"
    )
