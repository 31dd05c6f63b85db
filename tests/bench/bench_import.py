"""What importing a model costs: seconds, and memory over its weights.

  python -m tests.bench.bench_import [ROW ...] [--layers=32]

Each row is a process of its own, which states the highest memory (VmHWM) less
what it held once everything was imported and JAX had started. The rows of
SmolLM2 are held against the weights' size, the tokenizer (24 MB) counted along;
those of a sharded checkpoint of Llama 3 8B's shape, whose files are holes,
against 2 GiB beside what was asked for. Pages of mapped files count as memory
here.
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

SMALL = "smollm2-135m"
ROWS = (
  "import_gguf_fp32",
  "import_gguf_bf16",
  "import_gguf_packed",
  "import_bnb_packed",
  "import_gptq_packed",
  "import_awq_packed",
  "import_compressed-tensors_packed",
  "import_hf_fp32",
  "import_hf_bf16",
  "import_8b_part",
  "convert_8b_hf",
)
LIMIT_RATIO = 1.2
LIMIT_PACKED = 1.3
LIMIT_EXTRA = 2 << 30
DEVICES = 8


def memory(field: str) -> int:
  """Returns `VmHWM` or `VmRSS` of this process, in bytes."""
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(field + ":"):
      return int(line.split()[1]) * 1024
  raise SystemExit(f"{field}: this system does not say it")


def part(folder: pathlib.Path) -> int:
  """Reads one device's part of `DEVICES`; returns its bytes.

  Ours are cut by input features, which are columns in these files: each of
  their lines is read in part, the most expensive way to cut them.
  """
  import jax

  from research import tree
  from research.interop import hf
  from research.io import unread

  model, tensors, _ = hf.open_model(folder, "bfloat16")
  described = hf.unread_params(model, tensors, "bfloat16")
  own = jax.tree.map(_own, described)
  return tree.nbytes(jax.block_until_ready(unread.place(own)))


def _own(x):
  """Returns the part of an unread array that the first device would have."""
  from research.io import unread

  index = [slice(0, n) for n in x.shape]
  axis = len(index) - 2
  if axis >= 0 and x.shape[axis] > 64:  # not the vectors of layers
    index[axis] = slice(0, x.shape[axis] // DEVICES)
  shape = unread.sizes(tuple(index))
  return unread.LazyArray(shape, x.dtype, lambda _: x.read(tuple(index)))


def measure(row: str, source: str, target: str) -> dict:
  """Runs one row in this process."""
  import jax
  import jax.numpy as jnp

  from research import tree
  from research.interop import convert, load, sources
  from research.interop.gguf.read import load_gguf  # noqa: F401

  jnp.zeros(1).block_until_ready()
  before, start = memory("VmRSS"), time.perf_counter()
  if row == "import_8b_part":
    size = part(pathlib.Path(source))
  elif row == "convert_8b_hf":
    opened = sources.open_source(source)
    convert.to_hf(opened, pathlib.Path(target), shard_size=2_000_000_000)
    size = 0
  else:
    kind = row.rsplit("_", 1)[1]
    dtype = "float32" if kind == "fp32" else "bfloat16"
    loaded = load.load_model(source, dtype, kind == "packed")
    size = tree.nbytes(jax.block_until_ready(loaded.params))
  seconds = time.perf_counter() - start
  peak = memory("VmHWM") - before
  return dict(
    row=row,
    seconds=round(seconds, 2),
    weights_bytes=size,
    peak_bytes=peak,
    extra_bytes=peak - size,
    ratio=round(peak / size, 3) if size else None,
  )


def prepare(row: str, folder: pathlib.Path, layers: int) -> str:
  """Returns what the row reads, made in `folder` where it is not there."""
  from tests import support_sparse

  if "8b" in row:
    place = folder / "8b"
    if not place.exists():
      place.mkdir()
      config = support_sparse.LLAMA_8B | dict(num_hidden_layers=layers)
      support_sparse.write(place, config)
    return str(place)
  if "gguf" in row:
    return SMALL
  kind = row.split("_")[1]
  place = folder / kind
  if not place.exists():
    flags = [f"--from={SMALL}", f"--to={place}", f"--format={kind}"]
    flags += ["--dtype=bfloat16"] if kind == "hf" else ["--requantize"]
    subprocess.run(
      [sys.executable, "-m", "experiments.convert", *flags],
      check=True,
      stdout=subprocess.DEVNULL,
    )
  return str(place)


def rows(names=ROWS, layers: int = 32) -> list[dict]:
  """Returns what each row's process measured, and whether it kept its bound.

  Args:
    names: of `ROWS`.
    layers: of the 8B shape; its conversion writes half a gigabyte each.
  """
  out = []
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    for row in names:
      source, target = prepare(row, folder, layers), folder / "out"
      module = [sys.executable, "-m", "tests.bench.bench_import", "--here"]
      done = subprocess.run(
        [*module, row, source, str(target)], stdout=subprocess.PIPE, text=True
      )
      shutil.rmtree(target, ignore_errors=True)
      if done.returncode:
        raise SystemExit(f"{row}: exit {done.returncode}")
      found = json.loads(done.stdout.strip().splitlines()[-1])
      if "8b" in row:
        found["kept"] = found["extra_bytes"] < LIMIT_EXTRA
      else:
        packed = row.endswith("packed")
        limit = LIMIT_PACKED if packed else LIMIT_RATIO
        found["kept"] = found["ratio"] <= limit
      out.append(found)
      print(f"  {row}: {found}", file=sys.stderr, flush=True)
  return out


def show(found: list[dict]) -> str:
  """Returns the table as Markdown."""
  lines = [
    "| row | s | weights MiB | peak MiB | over weights | extra MiB | kept |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  for r in found:
    ratio = f"{r['ratio']:.2f}" if r["ratio"] else ""
    kept = {True: "yes", False: "NO", None: ""}[r.get("kept")]
    mib = [r[k] >> 20 for k in ("weights_bytes", "peak_bytes", "extra_bytes")]
    lines.append(
      f"| {r['row']} | {r['seconds']} | {mib[0]} | {mib[1]} | {ratio} "
      f"| {mib[2]} | {kept} |"
    )
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("rows", nargs="*", default=ROWS, metavar="ROW")
  parser.add_argument("--layers", type=int, default=32)
  args = parser.parse_args()
  found = rows(args.rows, args.layers)
  print(show(found))
  print(json.dumps({"rows": found}))
  if any(r.get("kept") is False for r in found):
    raise SystemExit("a bound was not kept")


if __name__ == "__main__":
  if sys.argv[1:2] == ["--here"]:
    print(json.dumps(measure(*sys.argv[2:])))
  else:
    main()
