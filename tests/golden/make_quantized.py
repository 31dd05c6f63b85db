"""Writes quantized/*: directories as other tools quantize models.

  python -m tests.golden.make_quantized

They are ours, written by `research.quant.checkpoints`, and there to be damaged:
what their numbers mean is tested from outside elsewhere.
"""

import functools
import pathlib
import shutil

import numpy as np

from research import tree
from research.interop import convert, parts, sources
from research.quant import qtensor
from research.quant.checkpoints import writers
from research.quant.formats.affine import Affine
from tests import support

SIZES = dict(width=32, hidden=32, heads=2, kv_heads=2, head_dim=16, depth=2)
WRITERS = {
  "gptq": writers.Gptq(),
  "awq": writers.Awq(group=16),
  "bnb": writers.Bnb(),
  "int8": writers.Bnb("int8"),
  "compressed": writers.Compressed(group=16),
}


def scattered(i, path, w):
  """Returns a matrix as GPTQ with act-order keeps it, others as they are."""
  if w.ndim != 2:
    return w
  q = qtensor.pack(w, Affine(block=16))
  order = np.random.default_rng(i).permutation(q.inputs).astype(np.int32)
  return qtensor.QTensor(
    q.parts, order, format=q.format, inputs=q.inputs, outputs=q.outputs
  )


def main():
  model = support.model(**SIZES)
  plain = support.params(model)
  ordered = tree.stack(
    tree.top(plain),
    [
      tree.map_paths(functools.partial(scattered, i), layer)
      for i, layer in enumerate(tree.layers(plain))
    ],
  )
  for name, writer in WRITERS.items():
    params = ordered if name == "gptq" else plain
    source = sources.Source(
      model=model,
      parts=parts.from_params(params),
      params=lambda params=params: params,
      origin={},
    )
    to = pathlib.Path(__file__).with_name("quantized") / name
    shutil.rmtree(to, ignore_errors=True)
    convert.to_quantized(source, to, writer, requantize=name != "gptq")


if __name__ == "__main__":
  main()
