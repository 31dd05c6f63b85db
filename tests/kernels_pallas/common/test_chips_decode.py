"""The decoding kernels through XLA's compiler for absent TPUs."""

import os
import subprocess
import sys

import pytest

from kernels_pallas.inspect.chips import CHIPS

pytestmark = pytest.mark.chips


@pytest.mark.parametrize("target", CHIPS)
def test_compiles_without_a_copy_of_the_pages(target):
  """32 cells: head dim x dtype of pages x decoding or mixed rows; caches."""
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  done = subprocess.run(
    [sys.executable, "-m", "tests.kernels_pallas.chips_decode", target],
    env=environment,
    capture_output=True,
    text=True,
    timeout=900,
    check=False,
  )
  assert done.stdout == "compiled 32\n", done.stdout + done.stderr[-2000:]
