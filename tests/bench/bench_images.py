"""How long an image takes to become what an encoder reads; transformers, too.

  .venv/bin/python -m tests.bench.bench_images \\
    --peers=.venv-peers/bin/python [--repeats=3] [ROW ...]

A photograph of 427 x 640 pixels, decoded, becomes normalised float32: views
and `Normalisation` are ours, the processor's call is theirs, by both backends.
Each side is one thread, as a data worker is. Goal 1 is against the PIL backend,
whose pixels ours are; torchvision's kernels are vectorised where Pillow's are
not, and a level away. In `_uint8` rows ours are views alone, which the device
normalises.

Each measurement is a process of its own, the three in turn.
"""

import argparse
import json
import statistics
import subprocess
import sys

from tests.bench import timing

KINDS = {
  "clip": ("CLIP", dict(size={"shortest_edge": 336}, crop_size=336)),
  "llava_next": ("LlavaNext", dict(size={"shortest_edge": 336}, crop_size=336)),
  "smolvlm": (
    "SmolVLM",
    dict(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}),
  ),
  "internvl": (
    "GotOcr2",
    dict(size={"height": 448, "width": 448}, crop_to_patches=True),
  ),
  "qwen2_vl": ("Qwen2VL", {}),
  "naflex": ("Siglip2", {}),
  "gemma3": ("Gemma3", dict(size={"height": 896, "width": 896})),
  "gemma4": ("Gemma4", {}),
  "molmo2": ("Molmo2", {}),
}
ROWS = (
  *(f"images_{name}" for name in KINDS),
  *(f"images_{name}_uint8" for name in KINDS),
)
SIDES = ("ours", "pil", "torchvision")
RUNS = 7


def timed(work) -> float:
  """Returns seconds of a call, the median of some after the first two."""
  work(), work()
  return timing.median_seconds(work, RUNS)


def ours(row: str, photo: str) -> float:
  """Returns seconds that we take for the photograph."""
  from research.vlm.images import (
    from_preprocessor_config,
    open_image,
    patchify,
  )

  name, values = KINDS[row.removeprefix("images_").removesuffix("_uint8")]
  config = {"image_processor_type": f"{name}ImageProcessor", **values}
  it = from_preprocessor_config(config, patch=14, pool=1)
  image = open_image(photo)
  native = name in ("Qwen2VL", "Siglip2", "Gemma4")
  merge = getattr(it.tiling, "merge", 1)

  def work():
    views = it.views(image)
    if row.endswith("_uint8"):
      return views
    if native:  # as the processors return them
      return it.normalise(patchify(views.pixels[0], it.tiling.patch, merge)[0])
    return it.floats(views)

  return timed(work)


def theirs(row: str, photo: str, backend: str) -> float:
  """Returns seconds that transformers' processor takes for it."""
  sys.path.insert(0, "tests/golden")
  import make_images
  import PIL.Image
  import torch
  import transformers

  torch.set_num_threads(1)
  name, values = KINDS[row.removeprefix("images_").removesuffix("_uint8")]
  config = {"image_processor_type": f"{name}ImageProcessor", **values}
  if backend == "pil":
    made, tensors = make_images.processor(config), "np"
  else:
    made = getattr(transformers, f"{name}ImageProcessor")(**values)
    tensors = "pt"
  image = PIL.Image.open(photo).convert("RGB")
  return timed(lambda: made(image, return_tensors=tensors))


def once(python: str, row: str, side: str, photo: str) -> float:
  """Returns seconds that a process of its own measured."""
  module = ["-W", "ignore", "-m", __spec__.name, "--here", side, row, photo]
  done = subprocess.run([python, *module], stdout=subprocess.PIPE, text=True)
  if done.returncode:
    raise SystemExit(f"{row}, {side}: exit {done.returncode}")
  return float(done.stdout.strip().splitlines()[-1])


def rows(names: list[str], peers: str, repeats: int) -> list[dict]:
  """Returns what each row's processes measured.

  Args:
    names: of `ROWS`.
    peers: their Python.
    repeats: rounds.
  """
  code = (
    "import pathlib, sklearn.datasets as d\n"
    "print(pathlib.Path(d.__file__).parent / 'images' / 'china.jpg')"
  )
  photo = subprocess.run([peers, "-c", code], stdout=subprocess.PIPE,
                         text=True, check=True).stdout.strip()  # fmt: skip
  found = []
  for row in names:
    # Molmo 2 has no PIL backend.
    sides = [s for s in SIDES if (s, row[:13]) != ("pil", "images_molmo2")]
    rounds = []
    for _ in range(repeats):
      pythons = {side: peers for side in sides} | {"ours": sys.executable}
      one = {side: once(pythons[side], row, side, photo) for side in sides}
      print(f"  {row}: {one}", file=sys.stderr, flush=True)
      rounds.append(one)
    it = {"row": row, "goal": 1.0}
    for side in sides:
      it[side] = statistics.median(one[side] for one in rounds)
      it[f"{side}_ratio"] = statistics.median(
        one[side] / one["ours"] for one in rounds
      )
    found.append(it)
  return found


def show(found: list[dict]) -> str:
  """Returns the table as Markdown; ratios are theirs over ours."""
  lines = [
    "| row | ms | PIL ms | ratio | torchvision ms | ratio | goal, PIL |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  for r in found:
    cells = [r["row"], f"{1000 * r['ours']:.1f}"]
    for side in SIDES[1:]:
      known = side in r
      cells.append(f"{1000 * r[side]:.1f}" if known else "-")
      cells.append(f"{r[side + '_ratio']:.2f}" if known else "-")
    lines.append(f"| {' | '.join(cells)} | {r['goal']:g} |")
  return "\n".join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
  parser.add_argument("--peers", required=True, help="their Python")
  parser.add_argument("--repeats", type=int, default=3)
  args = parser.parse_args()
  if unknown := set(args.rows) - set(ROWS):
    parser.error(f"no such rows: {unknown}; there are {', '.join(ROWS)}")
  table = rows(args.rows or list(ROWS), args.peers, args.repeats)
  print(show(table))
  print(json.dumps({"rows": table}))


if __name__ == "__main__":
  if sys.argv[1:2] == ["--here"]:
    side, row, photo = sys.argv[2:5]
    print(ours(row, photo) if side == "ours" else theirs(row, photo, side))
  else:
    main()
