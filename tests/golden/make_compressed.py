"""Writes compressed.json: what compressed-tensors and torchao make of numbers.

  .venv-peers/bin/python tests/golden/make_compressed.py

Element t (C order) of torch's [out, in] matrix is
sin(0.7 t + 0.3) (0.5 + (37 t mod 101) / 101), rounded to the dtype.

`checkpoints`: for each case the scheme's config, the tensors of one module, and
the decoded matrix in float32, arrays as [dtype, shape, hexadecimal bytes].
`microscaling`: of torchao, for each element and rule, the bytes of scales and
of codes of `normal`.
"""

import json
import pathlib
import warnings

import numpy as np
import torch

warnings.filterwarnings("ignore")

from compressed_tensors.compressors import BaseCompressor  # noqa: E402
from compressed_tensors.compressors.format import (  # noqa: E402
  infer_module_format,
)
from compressed_tensors.quantization import QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.utils import (  # noqa: E402
  calculate_qparams,
  generate_gparam,
  maybe_pad_tensor_for_block_quant,
)
from torchao.prototype.mx_formats import mx_tensor  # noqa: E402
from torchao.prototype.mx_formats.config import (  # noqa: E402
  ScaleCalculationMode,
)

MX = dict(
  num_bits=4,
  type="float",
  strategy="group",
  group_size=32,
  scale_dtype=torch.uint8,
  zp_dtype=torch.uint8,
)
FP8 = dict(num_bits=8, type="float")
FP8_INPUTS = dict(num_bits=8, type="float", strategy="token", dynamic=True)
INT8_INPUTS = dict(num_bits=8, strategy="token", dynamic=True)
E4M3 = torch.float8_e4m3fn

CASES = {  # name -> out, in, dtype, arguments of weights, of inputs
  f"int{bits}{'' if symmetric else '_asym'}": (
    *(12, 64, "float32"),
    dict(num_bits=bits, strategy="group", group_size=32, symmetric=symmetric),
    None,
  )
  for bits in range(2, 9)
  for symmetric in (True, False)
} | {
  "w4a16": (2, 128, "float32", dict(num_bits=4, group_size=128), None),
  "int3_channel_asym": (
    *(37, 40, "float32"),
    dict(num_bits=3, strategy="channel", symmetric=False),
    None,
  ),
  "int4_tensor": (
    *(5, 36, "float32"),
    dict(num_bits=4, strategy="tensor"),
    None,
  ),
  "int5_tensor_asym": (
    *(5, 40, "float32"),
    dict(num_bits=5, strategy="tensor", symmetric=False),
    None,
  ),
  "int4_bf16": (
    *(8, 64, "bfloat16"),
    dict(num_bits=4, strategy="group", group_size=16),
    None,
  ),
  "int8_channel": (
    *(7, 24, "bfloat16"),
    dict(num_bits=8, strategy="channel"),
    INT8_INPUTS,
  ),
  "int8_channel_asym": (
    *(7, 24, "float32"),
    dict(num_bits=8, strategy="channel", symmetric=False),
    INT8_INPUTS,
  ),
  "int8_tensor": (
    *(7, 24, "float32"),
    dict(num_bits=8, strategy="tensor"),
    INT8_INPUTS,
  ),
  "fp8_tensor": (
    *(6, 20, "float32"),
    FP8 | dict(strategy="tensor"),
    FP8_INPUTS,
  ),
  "fp8_channel": (
    *(6, 20, "bfloat16"),
    FP8 | dict(strategy="channel"),
    FP8_INPUTS,
  ),
  "fp8_block": (
    *(10, 40, "float32"),
    FP8 | dict(strategy="block", block_structure=[4, 16]),
    FP8_INPUTS,
  ),
  "nvfp4": (
    *(2, 128, "float32"),
    dict(
      num_bits=4,
      type="float",
      strategy="tensor_group",
      group_size=16,
      scale_dtype=E4M3,
      zp_dtype=E4M3,
    ),
    None,
  ),
  "mxfp4": (4, 64, "float32", MX, None),
  "mxfp4_bf16": (4, 64, "bfloat16", MX, None),
  "mxfp6": (4, 64, "float32", MX | dict(num_bits=6), None),
  "mxfp8": (4, 64, "float32", MX | dict(num_bits=8), None),
}

RULES = ("floor", "rceil", "ceil", "even")
ELEMENTS = {
  "e2m1": torch.float4_e2m1fn_x2,
  "e2m3": mx_tensor.DTYPE_FP6_E2M3,
  "e3m2": mx_tensor.DTYPE_FP6_E3M2,
  "e4m3": torch.float8_e4m3fn,
  "e5m2": torch.float8_e5m2,
}


def matrix(outputs, inputs, dtype="float32"):
  t = np.arange(outputs * inputs, dtype=np.float64)
  x = np.sin(0.7 * t + 0.3) * (0.5 + (37 * t % 101) / 101)
  x = torch.tensor(x.astype(np.float32).reshape(outputs, inputs))
  return x.to(getattr(torch, dtype))


def normal():
  """Rows of many magnitudes, among them one of zeros, [12, 64]."""
  x = np.random.default_rng(0).standard_normal((12, 64))
  x *= np.exp2(np.arange(-6, 6))[:, None] * 1.07
  x[3] = 0
  x[4, :8] = [6, -6, 7, 7.5, -8, 0.25, -0.75, 1.25]
  return torch.tensor(x.astype(np.float32))


def array(x) -> list:
  x = x.detach().contiguous()
  name = str(x.dtype).removeprefix("torch.")
  raw = x.reshape(-1).view(torch.uint8).numpy().tobytes().hex()
  return [name, list(x.shape), raw]


def ranges(w, args):
  """Returns the smallest and the largest weight of what shares a scale."""
  kind = args.strategy
  if kind == "tensor":
    return w.min().reshape(1), w.max().reshape(1)
  if kind == "channel":
    return w.amin(1, keepdim=True), w.amax(1, keepdim=True)
  if kind == "block":
    rows, columns = args.block_structure
    w = maybe_pad_tensor_for_block_quant(w, (rows, columns))
    w = w.reshape(w.shape[0] // rows, rows, -1, columns)
    return w.amin((1, 3)), w.amax((1, 3))
  groups = w.reshape(w.shape[0], -1, args.group_size)
  return groups.amin(-1), groups.amax(-1)


def scheme_of(weights, inputs) -> QuantizationScheme:
  return QuantizationScheme(
    targets=["Linear"], weights=weights, input_activations=inputs
  )


def compressed(w, scheme) -> dict[str, torch.Tensor]:
  """Returns a module's tensors, by compressed-tensors' own functions."""
  args, state = scheme.weights, {"weight": w}
  low, high = ranges(w, args)
  if args.strategy == "tensor_group":
    state["weight_global_scale"] = generate_gparam(w.min(), w.max())
  scale, zero = calculate_qparams(
    low, high, args, state.get("weight_global_scale")
  )
  state |= {"weight_scale": scale, "weight_zero_point": zero}
  form = infer_module_format(torch.nn.Linear, scheme)
  return BaseCompressor.get_value_from_registry(form).compress(state, scheme)


def decompressed(state, scheme) -> torch.Tensor:
  form = infer_module_format(torch.nn.Linear, scheme)
  made = BaseCompressor.get_value_from_registry(form)
  return made.decompress(state, scheme)["weight"]


def checkpoint(outputs, inputs, dtype, weights, activations) -> dict:
  scheme = scheme_of(weights, activations)
  state = compressed(matrix(outputs, inputs, dtype), scheme)
  form = infer_module_format(torch.nn.Linear, scheme).value
  return {
    "case": [outputs, inputs, dtype],
    "format": form,
    "scheme": json.loads(scheme.model_dump_json()),
    "tensors": {name: array(x) for name, x in sorted(state.items())},
    "dense": array(decompressed(state, scheme).float()),
  }


def microscaling() -> dict:
  out = {}
  for name, element in ELEMENTS.items():
    for rule in RULES:
      scale, codes = mx_tensor.to_mx(
        normal(), element, 32, ScaleCalculationMode(rule)
      )
      out[f"{name} {rule}"] = [array(scale)[2], array(codes)[2]]
  return out


def make() -> dict:
  return {
    "checkpoints": {name: checkpoint(*case) for name, case in CASES.items()},
    "normal": array(normal()),
    "microscaling": microscaling(),
  }


if __name__ == "__main__":
  path = pathlib.Path(__file__).with_name("compressed.json")
  path.write_text(json.dumps(make(), indent=0) + "\n")
