"""Laws that hold bit by bit, compiled as users compile.

The suite turns LLVM's optimizations off (`conftest.py`), which could hide that
two programs round differently once they are on. One law of each kind runs here
again with XLA's own defaults, in a process of its own. A new kind of law that
says "bit by bit" of two programs belongs here.
"""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

LAWS = {
  "a resumed run is one that was not stopped": (
    "training/test_loop.py::test_ten_steps_are_five_and_five"
  ),
  "a fresh adapter is its base, packed or not": (
    "lora/test_lora_tensor.py::test_zero_b_is_bitwise_the_base"
  ),
  "a packed matrix decodes to its format's own numbers": (
    "quant/formats/test_ggml.py::test_dense_is_bitwise_ggmls_and_blocks_come_back"
    "[Q4_1--2]"
  ),
  "what is converted is what training rounded": (
    "quant/algorithms/test_qat.py::test_what_is_converted_is_what_was_trained_bit_for_bit"
    "[int4-asym-g32]"
  ),
  "what is replayed is what would be computed": (
    "quant/test_activation_cache.py::test_what_something_new_leads_to_is_computed"
  ),
  "a stream is the whole text": (
    "generation/test_generate.py::test_complete_is_the_joined_stream"
  ),
  "a row's sample is its own, whatever the batch": (
    "generation/test_generate.py::test_samples_do_not_depend_on_their_batch"
  ),
  "shared pages are pages of one's own": (
    "generation/test_generate_paged.py"
    "::test_what_is_shared_is_bit_by_bit_what_would_be_read[8]"
  ),
  "guidance by nothing is no guidance": (
    "diffusion/sampling/test_denoiser.py::test_no_guidance_is_no_guidance"
  ),
}
"""What is claimed -> which test says so, under tests/research."""

FEW = [name for name in LAWS if re.search("packed|replayed|nothing", name)]
"""Laws that compile in seconds."""


@pytest.mark.parametrize(
  "laws", [FEW, pytest.param(list(LAWS), marks=pytest.mark.slow)], ids=len
)
def test_laws_hold_as_users_compile(laws):
  nodes = [f"tests/research/{LAWS[name]}" for name in laws]
  done = subprocess.run(
    [sys.executable, "-m", "pytest", "-q", "--slow", "-p", "no:xdist", *nodes],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": ""},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
  passed = int(re.search(r"(\d+) passed", done.stdout)[1])
  assert passed >= len(laws) and "skipped" not in done.stdout
