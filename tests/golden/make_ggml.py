"""Writes ggml.npz: a matrix in every block type by ggml's own C, and values.

  pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36
  tar xf llama_cpp_python-0.3.36.tar.gz
  python tests/golden/make_ggml.py --ggml=.../vendor/llama.cpp/ggml

Needs NumPy and a C compiler, which is told not to contract products and sums:
with contraction the C code itself gives other bytes on other machines.

w             float32 [12, 512], rows that are easy and rows that are not
importance    float32 [512]
KIND          uint8 [12, bytes], `w` encoded
KIND.i        the same with importances, where the type has them
KIND.raw      uint8 [2, bytes], random
KIND.values   float32 [2, 512], what those mean
"""

import argparse
import ctypes
import pathlib
import subprocess
import tempfile

import numpy as np

# name: (ggml's id, block, bytes); whether importances change anything.
KINDS = {
  "Q4_0": (2, 32, 18, True),
  "Q4_1": (3, 32, 20, True),
  "Q5_0": (6, 32, 22, True),
  "Q5_1": (7, 32, 24, True),
  "Q8_0": (8, 32, 34, False),
  "Q2_K": (10, 256, 84, True),
  "Q3_K": (11, 256, 110, True),
  "Q4_K": (12, 256, 144, True),
  "Q5_K": (13, 256, 176, True),
  "Q6_K": (14, 256, 210, True),
  "Q8_K": (15, 256, 292, False),
  "IQ4_NL": (20, 32, 18, True),
  "IQ4_XS": (23, 256, 136, True),
  "TQ1_0": (34, 256, 54, False),
  "TQ2_0": (35, 256, 66, False),
  "MXFP4": (39, 32, 17, False),
  "NVFP4": (40, 64, 36, False),
}
STUB = """
#include "ggml.h"
#include <stdlib.h>
static const int sizes[][3] = {%s};
static const int *of(int t) {
  for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++)
    if (sizes[i][0] == t) return sizes[i];
  abort();
}
size_t ggml_row_size(enum ggml_type t, int64_t n) {
  return n / of(t)[1] * of(t)[2];
}
size_t ggml_type_size(enum ggml_type t) { return of(t)[2]; }
const char *ggml_type_name(enum ggml_type t) { return "a type"; }
void ggml_abort(const char *f, int l, const char *m, ...) { abort(); }
void ggml_critical_section_start(void) {}
void ggml_critical_section_end(void) {}
"""


def library(ggml: pathlib.Path) -> ctypes.CDLL:
  """Returns the quantizers, compiled."""
  folder = pathlib.Path(tempfile.mkdtemp())
  rows = (f"{{{i}, {block}, {size}}}" for i, block, size, _ in KINDS.values())
  (folder / "stub.c").write_text(STUB % ", ".join(rows))
  out = folder / "quants.so"
  subprocess.run(
    [
      *("cc", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-D_GNU_SOURCE"),
      *(f"-I{ggml / 'include'}", f"-I{ggml / 'src'}", "-o", str(out)),
      *(str(folder / "stub.c"), str(ggml / "src" / "ggml-quants.c"), "-lm"),
    ],
    check=True,
  )
  return ctypes.CDLL(str(out))


def _function(kind: str) -> str:
  return kind.lower().replace("_k", "_K")


def encode(lib, kind: str, w: np.ndarray, importance=None) -> np.ndarray:
  """Returns the rows of `w` in blocks."""
  _, block, size, _ = KINDS[kind]
  rows, columns = w.shape
  out = np.zeros((rows, columns // block * size), np.uint8)
  pointer = ctypes.c_void_p
  if kind == "Q8_K":
    lib.quantize_row_q8_K_ref(
      pointer(w.ctypes.data), pointer(out.ctypes.data), ctypes.c_int64(w.size)
    )
    return out
  f = getattr(lib, f"quantize_{_function(kind)}")
  f.restype = ctypes.c_size_t
  weights = None if importance is None else importance.ctypes.data
  f(
    *(pointer(w.ctypes.data), pointer(out.ctypes.data)),
    *(ctypes.c_int64(rows), ctypes.c_int64(columns), pointer(weights)),
  )
  return out


def decode(lib, kind: str, raw: np.ndarray, columns: int) -> np.ndarray:
  """Returns what blocks mean."""
  out = np.zeros((len(raw), columns), np.float32)
  f = getattr(lib, f"dequantize_row_{_function(kind)}")
  f(
    *(ctypes.c_void_p(raw.ctypes.data), ctypes.c_void_p(out.ctypes.data)),
    ctypes.c_int64(out.size),
  )
  return out


def matrix(rng: np.random.Generator) -> np.ndarray:
  """Returns rows of every scale, with zeros, constants, outliers and ties."""
  w = 0.05 * rng.standard_normal((12, 512))
  w[0] = 0
  w[1] = 0.3
  w[2, 256:] = -0.3
  w[3, :300] = 0
  w[4] *= 1e-6
  w[5, ::7] *= 50
  w[6] *= 1e-20
  w[7] = abs(w[7]) + 1
  w[8] *= 1e4
  w[9] = 2.0 ** rng.integers(-9, 9, 512) * rng.choice([-1, 1], 512)
  w[10] = rng.laplace(size=512)
  return w.astype(np.float32)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--ggml", type=pathlib.Path, required=True)
  to = pathlib.Path(__file__).with_name("ggml.npz")
  parser.add_argument("--to", type=pathlib.Path, default=to)
  args = parser.parse_args()
  lib, rng = library(args.ggml), np.random.default_rng(0)
  w = matrix(rng)
  importance = (10 * rng.random(512) ** 4).astype(np.float32)
  out = {"w": w, "importance": importance}
  for kind, (_, block, size, weighed) in KINDS.items():
    out[kind] = encode(lib, kind, w)
    if weighed:
      out[f"{kind}.i"] = encode(lib, kind, w, importance)
    raw = rng.integers(0, 256, (2, 512 // block * size), np.uint8)
    out[f"{kind}.raw"] = raw
    out[f"{kind}.values"] = decode(lib, kind, raw, 512)
  np.savez_compressed(args.to, **out)


if __name__ == "__main__":
  main()
