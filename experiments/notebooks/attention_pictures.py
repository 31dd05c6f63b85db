"""Pictures of what attention costs; rows are those of `attention_costs`."""

import pathlib
import tempfile
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from kernels_pallas.inspect import __main__ as inspect
from kernels_pallas.masks import Mask, intervals


def memory(rows: list[dict[str, Any]]) -> Any:
  """Returns a figure of memory against length, both logarithmic."""
  figure, axis = plt.subplots(figsize=(6, 4))
  lengths = [row["length"] for row in rows]
  for name, style in (("naive", "o-"), ("flash", "s-"), ("scores", "k:")):
    gib = [(row[name] or np.nan) / 2**30 for row in rows]
    axis.loglog(lengths, gib, style, base=2, label=name)
  axis.set(xlabel="tokens", ylabel="GiB", title="one head, forward + backward")
  axis.legend()
  return figure


def traffic(rows: list[dict[str, Any]], ridges: list[dict[str, Any]]) -> Any:
  """Returns a figure of bytes and of FLOPs a byte against block size."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
  plain, *tiled = rows
  blocks = [row["block"] for row in tiled]
  left.loglog(blocks, [r["bytes"] / 2**30 for r in tiled], "s-", label="tiles")
  left.axhline(plain["bytes"] / 2**30, color="C1", label="standard")
  left.set(xlabel="block", ylabel="GiB moved", title="HBM traffic")
  left.legend()
  right.loglog(blocks, [r["intensity"] for r in tiled], "s-", label="tiles")
  right.axhline(plain["intensity"], color="C1", label="standard")
  for n, row in enumerate(sorted(ridges, key=lambda row: row["ridge"])):
    right.axhline(row["ridge"], color="gray", linewidth=0.5)
    place = blocks[n % len(blocks)]  # names of near ridges side by side
    right.text(place, row["ridge"], row["chip"], fontsize=7, color="gray")
  right.set(xlabel="block", ylabel="FLOPs a byte", title="against the ridges")
  for axis in (left, right):
    axis.set_xticks(blocks, blocks)
    axis.xaxis.minorticks_off()
  figure.tight_layout()
  return figure


def tiles(masks: dict[str, Mask], length: int, block: int) -> Any:
  """Returns a figure of the tiles that each mask visits; needs static masks."""
  figure, axes = plt.subplots(1, len(masks), figsize=(3 * len(masks), 3.4))
  for axis, (name, mask) in zip(np.ravel(axes), masks.items(), strict=True):
    found = classes(mask, length, block)
    skipped = (found == intervals.EMPTY).mean()
    axis.imshow(found, vmin=0, vmax=2, cmap="viridis")
    axis.set_title(f"{name}: {skipped:.0%} skipped", fontsize=9)
    axis.set(xlabel="tile of keys", ylabel="tile of queries")
  figure.tight_layout()
  return figure


def classes(mask: Mask, length: int, block: int) -> np.ndarray:
  """Returns the class of every tile: 0 skipped, 1 in part, 2 wholly visible."""
  found = intervals.mask_intervals(mask, length, length)
  return intervals.tile_classes(found, length, length, block, block)[0]


def online(scores: np.ndarray, values: np.ndarray, block: int) -> list[dict]:
  """Returns the state of the online softmax after each block of keys.

  Args:
    scores: Of one query, [S].
    values: One number a key, [S].
    block: Keys a step.

  Returns:
    Dicts of m (largest score so far), l (sum of exp(s - m)), acc (sum of
    exp(s - m) v) and output, acc / l (kernels_pallas/MATH.md 2).
  """
  m, l, acc, steps = -np.inf, 0.0, 0.0, []
  for start in range(0, len(scores), block):
    s, v = scores[start : start + block], values[start : start + block]
    new = max(m, float(s.max()))
    p, old = np.exp(s - new), np.exp(m - new)
    l, acc, m = l * old + p.sum(), acc * old + (p * v).sum(), new
    steps.append({"m": m, "l": l, "acc": acc, "output": acc / l})
  return steps


def softmax_steps(steps: list[dict], exact: float) -> Any:
  """Returns a figure of `online`'s states and the exact output."""
  figure, axes = plt.subplots(1, 3, figsize=(11, 3))
  for axis, name in zip(axes, ("m", "l", "output"), strict=True):
    axis.plot([step[name] for step in steps], "o-")
    axis.set(xlabel="block of keys", title=name)
  axes[2].axhline(exact, color="C1", linestyle=":")
  figure.tight_layout()
  return figure


def schedule(target: str, *options: str) -> Any:
  """Returns a figure of our forward kernel's schedule above splash's.

  Prints their numbers, too. Needs libtpu, no TPU; without it, says so and
  returns None.
  """
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "schedule.png"
    arguments = [f"--target={target}", "--compare=splash", f"--picture={path}"]
    if inspect.main([*arguments, *options]) or not path.exists():
      print("schedule: skipped, see the line above or on stderr")
      return None
    image = plt.imread(path)
  figure, axis = plt.subplots(figsize=(11, 6))
  axis.imshow(image)
  axis.axis("off")
  return figure
