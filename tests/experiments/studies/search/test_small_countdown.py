"""The countdown ladder from training to verdicts, at small size.

Its own commands, and a beam of 4, run by `experiments.study`: three numbers,
widths of 24 and 64, 100 problems. What it leaves is counted again here, from
the texts alone.
"""

import collections
import dataclasses
import json
import math
import pathlib
import re

import jaxtyping
import numpy as np
import pytest
from scipy import stats

from experiments import study as command
from experiments.core import cli, config, train_eval
from experiments.searching import running
from experiments.studies import pipeline, protocol

RUN = "runs/search/claims_countdown_ladder.gin"
ONCE = "p32", "p96", "labels", "test", "reward", "p32_greedy", "p96_greedy"
TWICE = "p32_pool", "p32_best_4", "beam_4"  # with two seeds of sampling
SEARCHES = "p32_greedy", "p96_greedy", "p32_pool", "beam_4"
BEAM = {
  "name": "beam_4",
  "command": "search",
  "path": "runs/search/countdown_beam.gin",
  "set": ["POLICY={p32}", "PRM={reward}", "SEED={seed}", "COPIES=4", "WIDTH=2"],
}
TRAINING = "WARMUP=20", "BATCH=64", "LENGTH=21"
POLICY = (
  *(*TRAINING, "STEPS=400", "NUMBERS=3", "NEW_TOKENS=15"),
  *("PROBLEMS=5000", "HELDOUT=100", "SAMPLES=1"),
)
LABELS = "NUMBERS=3", "label_run.LabelRun.new_tokens=15"
SEARCH = (
  *("NUMBERS=3", "PROBLEMS=(0, 100)"),
  "search_run.SearchRun.new_tokens=15",
)
SMALL = {
  "p32": (*POLICY, "WIDTH=24"),
  "p96": (*POLICY, "WIDTH=64", "STEPS=60"),
  "labels": (*LABELS, "LAST=500", "COPIES=4"),
  "test": (*LABELS, "LAST=100", "COPIES=2"),
  "reward": (*TRAINING, "STEPS=150"),
}
"""Bindings after those of the experiment; of searches, `SEARCH`."""

SYSTEMS = """
pipeline.Pipeline.seeds = 2
pipeline.Pipeline.shown = [
  '25k, greedy', 'beam of 4', '25k, best of 16', '25k, exact check of 6',
  '222k, greedy']
pipeline.Pipeline.curves = ['25k']
pipeline.Pipeline.reports = [@sizes.EffectiveSizes()]
sizes.EffectiveSizes.compared = ['beam of 4']
sizes.EffectiveSizes.ladder = [
  {'system': '25k, greedy', 'parameters': 13944},
  {'system': '222k, greedy', 'parameters': 98368}]
"""
COMPARED = 0, 4, 5
"""Of the study's comparisons; a beam's is added."""

# Of a model of two layers: parameters of its products, without the head.
MATRICES = {24: 2 * (4 * 24**2 + 3 * 24 * 64)}
PROMPT = 6


def study_file(folder: pathlib.Path) -> pathlib.Path:
  """Writes a run file of the experiment with small settings of its steps."""
  study = config.read(RUN, root=protocol.Run).experiment.study
  names = {*ONCE, *TWICE}
  steps = [
    dataclasses.asdict(x) | ({"seeds": 1} if x.name in ONCE else {})
    for x in study.steps
    if x.name in names
  ] + [BEAM]
  compared = [
    dataclasses.asdict(x) | {"first": x.first.name, "second": x.second.name}
    for x in (study.comparisons[i] for i in COMPARED)
  ]
  compared.append(
    {
      "claim": "A beam of 4 beats the best of 4",
      "first": "beam of 4",
      "second": "25k, best of 4",
      "within": 1.05,
    }
  )
  systems = [dataclasses.asdict(x) for x in study.systems if x.step in names]
  systems.append({"title": "beam of 4", "step": "beam_4"})
  overrides = {x["name"]: SMALL.get(x["name"], SEARCH) for x in steps}
  lines = [
    "from __gin__ import dynamic_registration",
    f"include '{RUN}'",
    "from experiments.studies import pipeline",
    "from experiments.studies.search import sizes",
    f"pipeline.Pipeline.steps = {steps!r}",
    f"pipeline.Pipeline.systems = {systems!r}",
    f"pipeline.Pipeline.comparisons = {compared!r}",
    f"pipeline.Pipeline.overrides = {overrides!r}",
  ]
  file = folder / "small.gin"
  file.write_text("\n".join(lines) + SYSTEMS)
  return file


def read_lines(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def solves(prompt: str, text: str) -> bool:
  """Whether a text makes the target, by Python's own arithmetic."""
  numbers, target = re.fullmatch(r"([\d ]+) > (\d+) >", prompt).groups()
  left = collections.Counter(map(int, numbers.split()))
  *steps, rest = text.strip().removesuffix("<eos>").split(";")
  if rest.strip():
    return False
  form = r"((\d+) [-+*] (\d+)) = (\d+)((?: \d+)*)"
  for step in steps:
    if not (found := re.fullmatch(form, step.strip())):
      return False
    made, a, b, c, rest = found.groups()
    used = collections.Counter([int(a), int(b)])
    copies = collections.Counter(map(int, rest.split()))
    if used - left or left - used != copies or eval(made) != int(c):
      return False
    if not 0 <= int(c) <= 199:
      return False
    left = copies + collections.Counter([int(c)])
  return left == collections.Counter([int(target)])


def flops(tokens: int, start: int, outputs: int, width: int) -> int:
  """Returns the FLOPs of a score model's pass, written out.

  Args:
    tokens: that it reads.
    start: before them, in its cache.
    outputs: scores.
    width: of the model, of two layers.
  """
  pairs = sum(start + i + 1 for i in range(tokens))
  products = 2 * tokens * MATRICES[width] + 2 * outputs * width
  return products + 2 * 4 * width * pairs


def check_labels(path: pathlib.Path, row: dict) -> None:
  """Checks outcomes against the texts, and labels against the outcomes."""
  found = read_lines(path)
  assert len(found) == row["solutions"] > 100
  outcomes = [solves(x["prompt"], "".join(x["steps"])) for x in found]
  assert outcomes == [x["final_correct"] for x in found]
  assert row["correct"] == pytest.approx(np.mean(outcomes))
  # The small policy is right once in a hundred times.
  assert row["correct"] < 1 and (row["correct"] > 0 or len(found) < 1000)
  for right, one in zip(outcomes, found, strict=True):
    # Two right steps are a right solution; one alone may be a beginning.
    if right or len(one["steps"]) > 1:
      assert right == (one["step_labels"] == [1] * len(one["steps"]))


def check_pool(path: pathlib.Path, row: dict, scored: bool) -> None:
  """Checks a search's row against the samples that it left.

  Args:
    path: of the samples.
    row: of the search.
    scored: whether a reward model has read them.
  """
  pool = read_lines(path)
  assert len(pool) == row["problems"] == 100
  right = [
    sum(
      x["trace"]["finish"] == "eos"
      and solves(
        one["problem"]["prompt"],
        "".join(step["text"] for step in x["trace"]["steps"]),
      )
      for x in one["samples"]
    )
    for one in pool
  ]
  assert right == row["right"] and sum(right) < sum(row["samples"])
  assert sum(right) > 0 or not scored
  for name in ("flops_policy", "flops_verifier"):
    mean = np.mean([one["ledger"][name] for one in pool])
    assert row[name] == pytest.approx(mean)
  assert row["flops_policy"] > 0
  assert (row["flops_verifier"] > 0) == scored


def check_verifier(path: pathlib.Path, dropped: bool) -> None:
  """Checks that the ledger has every token that the reward model read.

  Args:
    path: of the pool.
    dropped: whether the search has read paths that it did not keep.
  """
  for one in read_lines(path):
    ledger, traces = one["ledger"], [x["trace"] for x in one["samples"]]
    assert all("score" in step for x in traces for step in x["steps"])
    assert {x["n_prompt"] for x in traces} == {PROMPT}
    written, read = (
      ledger["policy_decode_tokens"],
      ledger["verifier_new_tokens"],
    )
    assert ledger["verifier_prefill_tokens"] == PROMPT
    # Texts are read: an end is none, nor is padding that a policy writes.
    assert read <= written
    kept = [(x["n_new"], len(x["steps"])) for x in traces]
    if dropped:
      assert written >= max(n for n, _ in kept)
      assert ledger["flops_verifier"] > 2 * read * MATRICES[24]
      continue
    assert written == sum(n for n, _ in kept)
    texts = ["".join(step["text"] for step in x["steps"]) for x in traces]
    words = [len(text.split()) for text in texts]
    assert read == sum(words)
    prompt = flops(PROMPT, 0, 0, 24)
    least = prompt + sum(
      flops(n, PROMPT, steps, 24)
      for n, (_, steps) in zip(words, kept, strict=True)
    )
    most = prompt + sum(flops(n, PROMPT, n, 24) for n, _ in kept)
    assert least <= ledger["flops_verifier"] <= most


def each(system, rows: list[dict]) -> np.ndarray:
  """Returns shares of right answers; those of an exact check by counting."""
  if system.checked is None:
    return np.array([row["each"] for row in rows])
  k = system.checked
  return np.array(
    [
      [
        1 - math.comb(n - right, k) / math.comb(n, k)
        for n, right in zip(row["samples"], row["right"], strict=True)
      ]
      for row in rows
    ]
  )


def cost(system, rows: list[dict]) -> float:
  """Returns FLOPs a problem; an exact check asks no verifier."""
  row = {name: np.mean([x[name] for x in rows]) for name in (
    "flops_policy", "flops_verifier", "prompt_flops_policy", "n"
  )}  # fmt: skip
  if system.checked is None:
    return row["flops_policy"] + row["flops_verifier"]
  prompt = row["prompt_flops_policy"]
  return prompt + system.checked * (row["flops_policy"] - prompt) / row["n"]


def check_verdict(claim, said: dict, first: list, second: list) -> None:
  """Checks a verdict against rows: means, interval, cost, decision."""
  number = r"(-?\d+\.\d+)"
  a, b, gain, low, high, ratio = map(
    float,
    re.match(
      rf"{number}% against {number}%: \+?{number} points \({number} to"
      rf" {number}\) \(too narrow: a bootstrap of 2\), 100 problems,"
      rf" 2.* seeds.* at {number} times the FLOPs",
      said["found"],
    ).groups(),
  )
  values = each(claim.first, first), each(claim.second, second)
  assert (a, b) == pytest.approx([100 * x.mean() for x in values], abs=0.051)
  apart = 100 * (values[0] - values[1])  # one seed meets both of the other
  assert gain == pytest.approx(apart.mean(), abs=0.051)
  costs = cost(claim.first, first) / cost(claim.second, second)
  assert ratio == pytest.approx(costs, abs=0.0051)
  rng = np.random.default_rng(7)
  drawn = [
    apart[rng.integers(2, size=2)][:, rng.integers(100, size=100)].mean()
    for _ in range(4000)
  ]
  assert (low, high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=1)
  least = 100 * claim.least
  seeds = apart.mean(axis=1)
  ends = stats.ttest_1samp(seeds, 0).confidence_interval(0.95)
  if claim.within is not None and costs > claim.within:
    expected = "does not hold"
  elif min(abs(low - least), abs(high - least)) < 0.06:
    return  # rounded for the text: which side it is on is not said
  elif low > least and ends.low > least:
    expected = "holds"
  elif high < least and ends.high <= least:
    expected = "does not hold"
  else:
    expected = "undecided"
  assert said["verdict"] == expected


@pytest.mark.slow
def test_the_study_runs_from_training_to_verdicts(
  tmp_path, capsys, monkeypatch
):
  # Other tests check types. Here, where every FLOP of every path is counted in
  # Python, they take as long as the study itself.
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  file, work = study_file(tmp_path), tmp_path / "work"
  given = ["study", f"--config={file}", f"--workdir={work}"]

  def run():
    assert cli.call(command.main, given) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])

  result = run()
  stored = [json.loads(x.read_text()) for x in (work / "arms").glob("*.json")]
  rows = {one["arm"]: one["row"] for one in stored}
  assert set(rows) == {
    *(f"{name}, seed 0" for name in (*ONCE, *TWICE)),
    *(f"{name}, seed 1" for name in TWICE),
  }

  # --- what the steps leave ---
  for name in ("p32", "p96", "reward"):
    left = json.loads((work / "runs" / f"{name}_0/result.json").read_text())
    row = rows[f"{name}, seed 0"]
    assert left["total_parameters"] == row["total_parameters"]
    assert (work / "runs" / f"{name}_0/config.gin").exists()
  for name, width, own in (("p32", 24, 13_944), ("p96", 64, 98_368)):
    total = rows[f"{name}, seed 0"]["total_parameters"]
    assert total - 2 * 208 * width == own  # without embedding and head
  assert rows["reward, seed 0"]["auc"] > 0.5  # by chance
  for name in ("labels", "test"):
    path = work / "runs" / f"{name}_0.jsonl"
    check_labels(path, rows[f"{name}, seed 0"])
  for arm, row in rows.items():
    name, seed = arm.split(", seed ")
    path = work / "runs" / f"{name}_{seed}/pool.jsonl"
    assert path.exists() == (name in SEARCHES)
    if path.exists():
      check_pool(path, row, scored="greedy" not in name)
    if name in ("p32_pool", "beam_4"):
      check_verifier(path, dropped=name == "beam_4")
  for seed in (0, 1):
    every, four = (
      rows[f"{x}, seed {seed}"] for x in ("p32_pool", "p32_best_4")
    )
    assert every["right"] == four["right"]  # of the same samples
    for name in ("flops_policy", "flops_verifier"):
      assert 0.25 < four[name] / every[name] < 0.3
  assert rows["p32_pool, seed 0"]["right"] != rows["p32_pool, seed 1"]["right"]

  # --- what they say ---
  study = config.read(str(file), root=protocol.Run).experiment.study
  assert len(result["verdicts"]) == len(study.comparisons) == 4
  for claim, said in zip(study.comparisons, result["verdicts"], strict=True):
    assert said["claim"] == claim.claim
    both = [
      [rows[x] for x in (f"{s.step}, seed {i}" for i in (0, 1)) if x in rows]
      for s in (claim.first, claim.second)
    ]
    check_verdict(claim, said, *both)
  table, ladder = result["tables"]
  assert len(table["rows"]) == 5 and len(ladder["rows"]) == 3
  assert (work / "small.png").stat().st_size > 10_000

  # --- again ---
  def fail(*_, **__):
    pytest.fail("it runs again")

  with monkeypatch.context() as patch:
    patch.setattr(pipeline.Pipeline, "run", fail)
    assert run() == result
  # Rows that are lost are read again from what the commands have left.
  for name in ("p32", "p32_pool"):
    (work / "arms" / f"{name}_seed_0.json").unlink()
  monkeypatch.setattr(train_eval.loop, "fit", fail)
  monkeypatch.setattr(running.sampling, "Search", fail)
  again = run()
  assert again["verdicts"] == result["verdicts"]
  assert again["tables"] == result["tables"]
