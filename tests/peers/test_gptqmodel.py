"""GPTQ and AWQ live: transformers opens what we write, and we what it writes.

Its kernels decode to float16, each number rounded once, and AWQ's round their
inputs and sums, too. So matrices are compared bit for bit with ours as halves,
and GPTQ's logits with what those make of a model in float32.
"""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import support
import test_compressed
from missing import missing

HERE = pathlib.Path(__file__).parent
# A folder of its own: wherever PEFT finds gptqmodel, it imports it for every
# layer that it adapts.
PACKAGES = HERE.parents[1] / ".venv-peers" / "gptqmodel"
SIDE = HERE / "gptqmodel_side.py"

if not (PACKAGES / "gptqmodel").is_dir():
  missing("gptqmodel", "gptqmodel")

# Its search for AWQ's clipping wants outputs in whole 64s.
SIZES = dict(hidden_size=128, head_dim=32, intermediate_size=192)
CASES = {  # name -> (what is converted, how)
  "gptq2": ("plain", ["--format=gptq:2", "--group_size=32"]),
  "gptq3": ("plain", ["--format=gptq:3", "--group_size=32"]),
  "gptq4": ("plain", ["--format=gptq:4", "--group_size=32"]),
  "gptq8_rows": ("plain", ["--format=gptq:8", "--group_size=0"]),
  "awq": ("plain", ["--format=awq", "--group_size=32"]),
  "gptq_of_awq": ("awq", ["--format=gptq"]),
  "gptq_ordered": ("their_gptq", ["--format=gptq"]),
  "awq_of_theirs": ("their_awq", ["--format=awq"]),
}
THEIRS = ["their_gptq", "their_awq"]

OURS = """
import json, sys
sys.path[:0] = ["tests/peers"]
import jax, jax.numpy as jnp, numpy as np, ours
from experiments.core import cli
from experiments import convert
from research.interop import load

folder, cases, theirs = sys.argv[1], *map(json.loads, sys.argv[2:])
rows = dict(np.load(f"{folder}/rows.npz"))

def run(name, to, *flags):
  flags = [f"--from={folder}/{name}", f"--to={folder}/{to}", *flags]
  assert cli.call(convert.main, ["convert", *flags]) == 0, (name, flags)

for name, (source, flags) in cases.items():
  run(source, name, "--requantize", *flags)
for name in [*cases, *theirs]:
  run(name, f"{name}_wide", "--format=hf", "--dtype=float32")
  it = load.load_model(f"{folder}/{name}", packed=False)
  half = jax.tree.map(
    lambda x: x.astype(jnp.float16).astype(jnp.float32), it.params
  )
  out = ours.greedy(it, None, rows)
  out["logits"] = ours.logits(it, None, rows)
  out["halves"] = np.asarray(ours.forward(it.model, half, rows["tokens"]))
  np.savez(f"{folder}/{name}_ours.npz", **out)
"""


def side(folder, *arguments) -> None:
  """Runs gptqmodel_side.py; what gptqmodel litters is left in the folder."""
  done = subprocess.run(
    [sys.executable, str(SIDE), *map(str, arguments)],
    cwd=folder,
    env=os.environ | {"PYTHONPATH": str(PACKAGES), "TMPDIR": str(folder)},
    capture_output=True,
    text=True,
    timeout=1200,
  )
  if done.returncode:
    pytest.fail(f"{arguments}\n{done.stderr[-3000:]}", pytrace=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_heptad):
  """All models, what transformers makes of them, and what we do."""
  to = tmp_path_factory.mktemp("models")
  with pytest.MonkeyPatch.context() as patch:
    for name, size in SIZES.items():
      patch.setitem(test_compressed.CONFIG, name, size)
    # What is not packed is of halves, so that halves of all keep it as it is.
    state = {k: x.half().float() for k, x in test_compressed.tensors().items()}
    test_compressed.save(to / "plain", state)
  rows = dict(tokens=test_compressed.TOKENS)
  rows |= dict(prompt=rows["tokens"][0], steps=16)
  np.savez(to / "rows.npz", **rows)
  for name in THEIRS:
    side(to, "quantize", to / "plain", to / name, name.removeprefix("their_"))
  encoded = map(json.dumps, (CASES, THEIRS))
  shared_heptad.script(OURS, to, *encoded)
  side(to, "open", to, *(to / name for name in [*CASES, *THEIRS]))
  return to


@pytest.mark.parametrize("name", [*CASES, *THEIRS])
def test_numbers_logits_and_tokens_are_the_same(name, folder):
  with np.load(folder / f"{name}.npz") as file:
    theirs = dict(file)
  with np.load(folder / f"{name}_ours.npz") as file:
    ours = dict(file)
  wide = safetensors.numpy.load_file(
    folder / f"{name}_wide" / "model.safetensors"
  )
  source = CASES[name][0] if name in CASES else ""
  plain = safetensors.numpy.load_file(folder / "plain" / "model.safetensors")
  found = {k: x for k, x in theirs.items() if k.startswith("weights/")}
  assert len(found) == 14
  for key, x in found.items():
    module = key.removeprefix("weights/") + ".weight"
    np.testing.assert_array_equal(x.T, wide[module].astype(np.float16), key)
    # It is quantized, and not much further off than its bits are.
    if source == "plain":
      assert 1e-3 < support.relative_error(x.T, plain[module]) < 0.6
  if "gptq" in name:
    assert support.relative_error(theirs["logits"], ours["halves"]) < 1e-5
  assert support.relative_error(theirs["logits"], ours["logits"]) < 5e-3
  np.testing.assert_array_equal(theirs["tokens"], ours["tokens"])
