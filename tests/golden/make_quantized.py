"""Writes quantized/*: directories as other tools quantize models.

  python -m tests.golden.make_quantized

They are ours, written by `research.quant.checkpoints`, and there to be damaged:
what their numbers mean is tested from outside elsewhere. `ours` is a checkpoint
of packed matrices, adapters over some. Names given make those alone.
"""

import functools
import pathlib
import shutil
import sys

import jax
import numpy as np

from research import tree
from research.interop import convert, parts, sources
from research.interop.quantized import writers
from research.quant import qtensor
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.ggml import GGML
from research.quant.quantize import Quantize
from tests import support, support_lora

SIZES = dict(width=32, hidden=32, heads=2, kv_heads=2, head_dim=16, depth=2)
WRITERS = {
  "gptq": writers.Gptq(),
  "awq": writers.Awq(group=16),
  "bnb": writers.Bnb(),
  "int8": writers.Bnb("int8"),
  "compressed": writers.Compressed(group=16),
  "fp8": writers.Compressed("fp8"),
  "nvfp4": writers.Compressed("nvfp4"),
  "mxfp4": writers.Compressed("mxfp4"),
}
NAMES = (*WRITERS, "ours")


def scattered(i, path, w):
  """Returns a matrix as GPTQ with act-order keeps it, others as they are."""
  if w.ndim != 2:
    return w
  q = qtensor.pack(w, Affine(block=16))
  order = np.random.default_rng(i).permutation(q.inputs).astype(np.int32)
  return qtensor.QTensor(
    q.parts, order, format=q.format, inputs=q.inputs, outputs=q.outputs
  )


def packed(plain):
  """Returns two formats, one with adapters, beside what is not packed."""
  some = Quantize(format=Codebook(block=32), targets=("q", "k", "v"))(plain)
  some = Quantize(format=GGML(), targets=("mlp/up", "mlp/down"))(some)
  adapting = support_lora.adapting(rank=2, targets=("q", "up"))
  return adapting(some, jax.random.key(0))


def main(names=NAMES):
  model = support.model(**SIZES)
  plain = support.params(model)
  ordered = tree.stack(
    tree.outer_params(plain),
    [
      tree.map_paths(functools.partial(scattered, i), layer)
      for i, layer in enumerate(tree.layers(plain))
    ],
  )
  kinds = {"gptq": ordered, "ours": packed(plain)}
  for name in names:
    params = kinds.get(name, plain)
    source = sources.Source(
      model=model,
      parts=parts.from_params(params),
      params=lambda params=params: params,
      origin={},
    )
    to = pathlib.Path(__file__).with_name("quantized") / name
    shutil.rmtree(to, ignore_errors=True)
    if name == "ours":
      convert.to_orbax(source, to)
      # Nobody reads it, and it names a folder of whoever ran this.
      to.joinpath("arrays/frozen/commit_success.txt").write_text("")
      continue
    rounds = name != "gptq"
    convert.to_quantized(source, to, WRITERS[name], requantize=rounds)


if __name__ == "__main__":
  main(sys.argv[1:] or NAMES)
