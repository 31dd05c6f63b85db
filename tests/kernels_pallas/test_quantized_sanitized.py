"""The C++ kernels under the sanitizers, and from one thread to five."""

import pathlib
import subprocess

import pytest

from kernels_pallas import cpu_library
from kernels_pallas.quantized_matmul.cpu import LIBRARY

DRIVER = pathlib.Path(__file__).with_name("panels_driver.cc")
FLAGS = ("-std=c++17", "-O1", "-g1", "-pthread", "-Wno-psabi")


def built(folder, *flags):
  """Returns the driver's path, or skips where it cannot be made."""
  try:
    cxx = cpu_library.compiler()
  except cpu_library.Unavailable as error:
    pytest.skip(str(error))
  made = folder / "driver"
  command = [cxx, *FLAGS, *flags, f"-I{LIBRARY.source.parent}"]
  done = subprocess.run(
    [*command, str(DRIVER), "-o", str(made)], capture_output=True, text=True
  )
  if done.returncode and ("-lasan" in done.stderr or "-ltsan" in done.stderr):
    pytest.skip(f"{cxx} has no {flags[0]}")
  assert not done.returncode, done.stderr
  return made


@pytest.mark.parametrize(
  ("sanitizers", "products"), [("address,undefined", 300), ("thread", 60)]
)
def test_products_of_any_shape_are_clean(sanitizers, products, tmp_path):
  made = built(
    tmp_path, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"
  )
  done = subprocess.run(
    [str(made), str(products)], capture_output=True, text=True, timeout=300
  )
  if "unexpected memory mapping" in done.stderr:
    pytest.skip("the thread sanitizer does not run on this kernel")
  assert not done.returncode, done.stdout + done.stderr
  assert done.stdout == f"{products} products\n"
