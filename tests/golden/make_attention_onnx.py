"""Makes attention_onnx.npz: ONNX's own generated cases of attention.

Every node case of the operators Attention and FlexAttention as the onnx package
generates it: inputs, attributes, and the output that its reference evaluator
gives. Nothing of it is changed; bfloat16 is kept as float32, which holds it.
Arrays that several cases share are kept once. Run, in an environment that has
onnx (1.23 made the file): `python tests/golden/make_attention_onnx.py`.
"""

import json
import pathlib

import numpy as np
import onnx
from onnx.backend.test.case.node import collect_testcases

OPERATORS = ("Attention", "FlexAttention")
# What a subgraph of FlexAttention does is said by its name.
SUBGRAPHS = ("score_mod", "prob_mod")


def attribute(value):
  """An attribute as JSON; a subgraph is its name and its constants."""
  found = onnx.helper.get_attribute_value(value)
  if value.name not in SUBGRAPHS:
    return found
  constants = [
    onnx.numpy_helper.to_array(x).ravel().tolist() for x in found.initializer
  ]
  return {
    "name": found.name,
    "operators": [node.op_type for node in found.node],
    "constants": constants,
  }


def main():
  """Writes the file beside this script."""
  arrays, cases, kept = {}, {}, {}

  def keep(array):
    dtype = array.dtype.name
    wide = array.astype(np.float32) if dtype == "bfloat16" else array
    key = (dtype, wide.shape, wide.tobytes())
    if key not in kept:
      kept[key] = f"a{len(kept)}"
      arrays[kept[key]] = wide
    return {"array": kept[key], "dtype": dtype}

  for case in collect_testcases(None):
    nodes = case.model.graph.node
    if len(nodes) != 1 or nodes[0].op_type not in OPERATORS:
      continue
    node, (given, found) = nodes[0], case.data_sets[0]
    names = [name for name in node.input if name]
    cases[case.name.removeprefix("test_")] = {
      "attributes": {a.name: attribute(a) for a in node.attribute},
      "inputs": {
        name: keep(np.asarray(x)) for name, x in zip(names, given, strict=True)
      },
      "output": keep(np.asarray(found[0])),
    }
  text = json.dumps({"onnx": onnx.__version__, "cases": cases})
  path = pathlib.Path(__file__).with_name("attention_onnx.npz")
  np.savez_compressed(path, cases=np.array(text), **arrays)


if __name__ == "__main__":
  main()
