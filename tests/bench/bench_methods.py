"""A training step of each method, ours against PEFT's, on SmolLM2-135M.

  make bench ARGS='method_lora method_hira --repeats=3'
  .venv/bin/python tests/bench/bench_methods.py ours ROW [RUNS [STEPS]]
  .venv-peers/bin/python tests/bench/bench_methods.py torch ROW [RUNS [STEPS]]

Whole optimizer steps in fp32 on every linear layer, 4 x 256 tokens, AdamW, as
in the row `train_fp32`; sizes of a method are the same on both sides, PEFT's
defaults but for LoRA's family (r = 8). AdaLoRA without its budget and
regularisation, on both sides. Methods that differ from LoRA or PiSSA in
their start alone (OLoRA, CorDA, LoRA-GA, EVA) have their speed. Each side runs
in a process of its own and prints one JSON line.
"""

import json
import math
import os
import pathlib
import statistics
import sys

METHODS = {
  "lora": ("lora", "LoRA", {}, "LoraConfig", {}),
  "dora": ("dora", "DoRA", {}, "LoraConfig", dict(use_dora=True)),
  "pissa": (
    "residual",
    "PiSSA",
    {},
    "LoraConfig",
    dict(init_lora_weights="pissa_niter_4"),
  ),
  "adalora": (
    "adalora",
    "AdaLoRA",
    dict(rank=12),
    "AdaLoraConfig",
    dict(init_r=12, total_step=1000),
  ),
  "vera": ("vera", "VeRA", dict(rank=256), "VeraConfig", dict(r=256)),
  "loha": ("loha", "LoHa", dict(rank=8), "LoHaConfig", dict(r=8)),
  "lokr": ("lokr", "LoKr", dict(rank=8), "LoKrConfig", dict(r=8)),
  "ia3": (
    "ia3",
    "IA3",
    {},
    "IA3Config",
    dict(feedforward_modules=["down_proj"]),
  ),
  "hira": ("hira", "HiRA", dict(rank=32), "HiraConfig", dict(r=32)),
  "kasa": ("kasa", "KaSA", {}, "LoraConfig", dict(kasa_config=dict(beta=1e-4))),
  "miss": ("miss", "MiSS", dict(rank=64), "MissConfig", dict(r=64)),
  "gralora": ("gralora", "GraLoRA", dict(rank=32), "GraloraConfig", dict(r=32)),
  "c3a": ("c3a", "C3A", dict(block=64), "C3AConfig", dict(block_size=64)),
  "shira": ("shira", "SHiRA", dict(rank=32), "ShiraConfig", dict(r=32)),
  "fourierft": ("fourierft", "FourierFT", {}, "FourierFTConfig", {}),
  "randlora": (
    "randlora",
    "RandLoRA",
    dict(rank=32),
    "RandLoraConfig",
    dict(r=32),
  ),
  "delora": ("delora", "DeLoRA", dict(rank=8), "DeloraConfig", dict(r=8)),
  "oft": ("rotations", "OFT", dict(block=32), "OFTConfig", {}),
  "boft": ("rotations", "BOFT", dict(block=4), "BOFTConfig", {}),
  "hra": ("rotations", "HRA", dict(rank=8), "HRAConfig", dict(r=8)),
}
"""Our file, class and options; PEFT's class and options."""

LOW_RANK = dict(r=8, lora_alpha=16)
"""Of PEFT's LoraConfig, the same as ours."""

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # fmt: skip # noqa: E501

REQUIRED = tuple(METHODS)[:9]
"""Those of the geometric mean."""

ROWS = tuple(f"method_{name}" for name in METHODS)


def ours(row: str, runs: int, steps: int) -> dict:
  """Times our step; `memory` is the process's peak."""
  import importlib

  import bench_ours

  from research.training.memory import peak_memory_bytes

  file, name, options, *_ = METHODS[row.removeprefix("method_")]
  module = importlib.import_module(f"research.lora.methods.{file}")
  kind = getattr(module, name)
  if file in ("lora", "dora", "residual", "kasa"):
    options = dict(rank=bench_ours.RANK, alpha=bench_ours.ALPHA) | options
  out = bench_ours.train("fp32", runs, steps, kind(**options))
  return out | dict(peak_rss_bytes=peak_memory_bytes())


def torch(row: str, runs: int, steps: int) -> dict:
  """Times PEFT's step."""
  import resource

  import bench_torch
  import peft
  import torch

  torch.set_num_threads(2)
  torch.manual_seed(0)
  *_, name, options = METHODS[row.removeprefix("method_")]
  options = dict(options)
  if name == "LoraConfig":
    options |= LOW_RANK
  config = getattr(peft, name)(
    target_modules=list(TARGETS), task_type="CAUSAL_LM", **options
  )
  out = bench_torch.train("fp32", runs, steps, config)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return out | dict(peak_rss_bytes=peak)


def rows(
  names: list[str], peers: str, repeats: int, huge_pages: str = "none"
) -> list[dict]:
  """Returns medians and ratios of each row.

  Args:
    names: of `ROWS`.
    peers: their Python.
    repeats: rounds; sides alternate.
    huge_pages: see `sides.environment`.
  """
  from tests.bench import sides  # the script alone does not see it

  keys = ("tokens_per_s", "peak_rss_bytes")
  found = []
  for row in names:
    line, pairs = sides.compare(__file__, row, peers, repeats, keys, huge_pages)
    for i, side in enumerate(("ours", "torch")):
      line[f"{side}_trainable"] = pairs[0][i]["trainable"]
    line["compile_s"] = pairs[0][0]["compile_s"]
    found.append(line)
    print(f"  {json.dumps(line)}", file=sys.stderr, flush=True)
  return found


def show(found: list[dict]) -> str:
  """Returns the table as Markdown, and the geometric mean of the ratios.

  `step` is the time of our step over that of our LoRA.
  """
  rates = {line["row"]: line["ours_tokens_per_s"] for line in found}
  lora = rates.get("method_lora")
  lines = [
    "| method | trained | ours tok/s | PEFT tok/s | ratio | step over LoRA's "
    "| ours GiB | PEFT GiB |",
    "| --- " * 8 + "|",
  ]
  for r in found:
    over = f"{lora / r['ours_tokens_per_s']:.2f}" if lora else "-"
    cells = [
      r["row"].removeprefix("method_"),
      f"{r['ours_trainable']:,}",
      f"{r['ours_tokens_per_s']:.0f}",
      f"{r['torch_tokens_per_s']:.0f}",
      f"{r['ratio']:.2f}",
      over,
      f"{r['ours_peak_rss_bytes'] / 2**30:.2f}",
      f"{r['torch_peak_rss_bytes'] / 2**30:.2f}",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  chosen = [
    math.log(r["ratio"])
    for r in found
    if r["row"].removeprefix("method_") in REQUIRED
  ]
  if chosen:
    mean = math.exp(statistics.fmean(chosen))
    lines.append(f"\ngeometric mean of {len(chosen)} methods: {mean:.2f}")
  return "\n".join(lines)


if __name__ == "__main__":
  sys.path[:0] = [str(pathlib.Path(__file__).parent), os.getcwd()]
  side, row, *counts = sys.argv[1:]
  runs, steps = map(int, (*counts, 3, 1)[:2])
  work = {"ours": ours, "torch": torch}[side]
  print(json.dumps(work(row, runs, steps)))
