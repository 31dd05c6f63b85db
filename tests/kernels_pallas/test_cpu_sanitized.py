"""The C++ kernels under the sanitizers, with one to five threads."""

import pathlib
import subprocess

import pytest

from kernels_pallas.decode_attention import cpu as decoding
from kernels_pallas.flash_attention import cpu as attention
from kernels_pallas.quantized_matmul import cpu as products

FLAGS = ("-std=c++17", "-O1", "-g1", "-pthread", "-Wno-psabi")
DRIVERS = {
  "panels": (products.LIBRARY, "products"),
  "attention": (attention.LIBRARY, "problems"),
  "decoding": (decoding.LIBRARY, "steps"),
}


def built(name, folder, cxx, *flags):
  """Returns the path of a driver, or skips where it cannot be built."""
  made = folder / "driver"
  source = pathlib.Path(__file__).with_name(f"{name}_driver.cc")
  command = [cxx, *FLAGS, *flags, f"-I{DRIVERS[name][0].source.parent}"]
  done = subprocess.run(
    [*command, str(source), "-o", str(made)], capture_output=True, text=True
  )
  if done.returncode and ("-lasan" in done.stderr or "-ltsan" in done.stderr):
    pytest.skip(f"{cxx} has no {flags[0]}")
  assert not done.returncode, done.stderr
  return made


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "sanitizers", "count"),
  [
    ("panels", "address,undefined", 30),
    ("panels", "thread", 20),
    ("attention", "address,undefined", 20),
    pytest.param("attention", "thread", 12, marks=pytest.mark.slow),
    ("decoding", "address,undefined", 20),
    pytest.param("decoding", "thread", 30, marks=pytest.mark.slow),
    pytest.param("panels", "address,undefined", 300, marks=pytest.mark.slow),
    pytest.param("attention", "address,undefined", 60, marks=pytest.mark.slow),
    pytest.param("decoding", "address,undefined", 60, marks=pytest.mark.slow),
  ],
)
@pytest.mark.sample(10)
def test_no_sanitizer_reports_for_any_shape(
  name, sanitizers, count, tmp_path, cxx
):
  made = built(
    name,
    tmp_path,
    cxx,
    f"-fsanitize={sanitizers}",
    "-fno-sanitize-recover=all",
  )
  done = subprocess.run(
    [str(made), str(count)], capture_output=True, text=True, timeout=300
  )
  if "unexpected memory mapping" in done.stderr:
    pytest.skip("the thread sanitizer does not run on this kernel")
  assert not done.returncode, done.stdout + done.stderr
  assert done.stdout == f"{count} {DRIVERS[name][1]}\n"
