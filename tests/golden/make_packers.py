"""Writes packers.json: how GPTQ's and AWQ's own tools lay codes out in words.

  pip download --no-deps --dest DIR auto-gptq==0.7.1
  pip download --no-deps --no-build-isolation --dest DIR autoawq==0.2.9
  (cd DIR && unzip -q auto_gptq-*.whl && tar xzf autoawq-*.tar.gz)
  .venv-peers/bin/python tests/golden/make_packers.py \\
    --gptq=DIR/auto_gptq --awq=DIR/autoawq-0.2.9/awq

Both packages want a GPU when they are imported, their packers do not: only the
files that pack are loaded. A matrix is scale * (code - zero), of random codes
and zeros; for GPTQ in order and in act-order (a `g_idx` that is none). `dense`
is what the tool itself decodes, [in, out] in float16. Tensors are [dtype,
shape, hexadecimal bytes]; `drawn` is what they were made of.
"""

import argparse
import importlib.util
import json
import pathlib
import sys
import types

import numpy as np
import torch

INPUTS, OUTPUTS, GROUP = 64, 32, 32


def drawn(bits, seed):
  """Returns (codes [in, out], zeros and scales [groups, out])."""
  rng = np.random.default_rng(seed)
  groups = INPUTS // GROUP
  codes = rng.integers(0, 2**bits, (INPUTS, OUTPUTS))
  zeros = rng.integers(1, 2**bits, (groups, OUTPUTS))
  scales = rng.uniform(0.01, 0.1, (groups, OUTPUTS)).astype(np.float16)
  return codes, zeros, scales


def linear_of(codes, zeros, scales, group):
  """Returns a layer of torch's with the weights that these stand for."""
  w = scales[group].astype(np.float32) * (codes - zeros[group])
  linear = torch.nn.Linear(INPUTS, OUTPUTS, bias=False)
  linear.weight.data = torch.tensor(w.T).half()
  return linear


def told(tensors):
  return {
    name: [str(x.dtype), list(x.shape), np.ascontiguousarray(x).tobytes().hex()]
    for name, x in tensors.items()
  }


def loaded(file, name):
  spec = importlib.util.spec_from_file_location(name, file)
  module = importlib.util.module_from_spec(spec)
  sys.modules[name] = module
  spec.loader.exec_module(module)
  return module


def case(tool, bits, ordered, codes, zeros, layer, names, dense):
  """Returns what the file holds of one matrix."""
  return {
    "tool": tool,
    "bits": bits,
    "ordered": ordered,
    "drawn": told({"codes": codes.astype("u1"), "zeros": zeros.astype("u1")}),
    "tensors": told({name: getattr(layer, name).numpy() for name in names}),
    "dense": None if dense is None else told({"w": dense.numpy()})["w"],
  }


def gptq(folder):
  """Yields the cases of auto-gptq."""
  file = folder / "nn_modules" / "qlinear" / "qlinear_cuda.py"
  kind = loaded(file, "auto_gptq_cuda").QuantLinear
  names = ("qweight", "qzeros", "scales", "g_idx")
  for bits in (2, 3, 4, 8):
    for ordered in (True, False):
      codes, zeros, scales = drawn(bits, bits)
      group = np.arange(INPUTS) // GROUP
      if not ordered:
        group = np.random.default_rng(bits).permutation(group)
      layer = kind(bits, GROUP, INPUTS, OUTPUTS, False)
      layer.pack(
        linear_of(codes, zeros, scales, group),
        torch.tensor(scales.T.copy()),
        torch.tensor(zeros.T.astype(np.float32)),
        torch.tensor(group, dtype=torch.int32),
      )
      dense = layer(torch.eye(INPUTS).half())
      yield case("gptq", bits, ordered, codes, zeros, layer, names, dense)


def awq(folder):
  """Yields the cases of autoawq; its package is not imported, its files are."""
  for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
    package = types.ModuleType(name)
    package.__path__ = [str(folder.parent / name.replace(".", "/"))]
    sys.modules[name] = package
  folder = folder / "modules" / "linear"
  gemm = loaded(folder / "gemm.py", "awq.modules.linear.gemm")
  gemv = loaded(folder / "gemv.py", "awq.modules.linear.gemv")
  codes, zeros, scales = drawn(4, 0)
  linear = linear_of(codes, zeros, scales, np.arange(INPUTS) // GROUP)
  names = ("qweight", "qzeros", "scales")
  for tool, kind in (
    ("gemm", gemm.WQLinear_GEMM),
    ("gemv", gemv.WQLinear_GEMV),
  ):
    turned = (lambda x: x) if tool == "gemm" else np.transpose
    layer = kind.from_linear(
      linear,
      4,
      GROUP,
      scales=torch.tensor(turned(scales).copy()),
      zeros=torch.tensor(turned(zeros).astype(np.float32)),
    )
    dense = None  # of gemv only a GPU decodes
    if tool == "gemm":
      dense = gemm.dequantize_gemm(
        layer.qweight, layer.qzeros, layer.scales, 4, GROUP
      )
    yield case(tool, 4, True, codes, zeros, layer, names, dense)


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("--gptq", type=pathlib.Path, required=True)
  parser.add_argument("--awq", type=pathlib.Path, required=True)
  given = parser.parse_args()
  cases = [*gptq(given.gptq), *awq(given.awq)]
  path = pathlib.Path(__file__).with_name("packers.json")
  path.write_text("[\n" + ",\n".join(map(json.dumps, cases)) + "\n]\n")
