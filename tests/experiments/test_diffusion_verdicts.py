"""Verdicts on diffusion's claims say what the rows say, either way."""

import copy
import dataclasses
import math

import pytest

from experiments.studies.diffusion import (
  alignment,
  caches,
  following,
  ladder,
  policies,
  reversal,
  tasks,
  truth,
)
from experiments.studies.diffusion import lengths as diffusion_lengths
from experiments.studies.diffusion import study as diffusion_study
from research.data.sources.synthetic import Markov

SOURCE = Markov(vocab=8, length=16)
JITTER = (-1e-4, 0.0, 1e-4)


def holds(study, rows):
  return [v.holds for v in study.verdicts(rows)]


def changed(rows, arms, path, values):
  """Rows in which one number of some arms is another one."""
  out = copy.deepcopy(rows)
  for arm, value in zip(arms, values, strict=True):
    at = out[arm]
    for name in path[:-1]:
      at = at[name]
    at[path[-1]] = value
  return out


# --- the ladder ---

LADDER = ladder.Ladder(source=SOURCE, steps=100, steps_factor=4)
ENTROPY = truth.entropy(SOURCE, 16)


def ladder_rows(**gaps):
  read = [51_200, 204_800]
  ends = {
    "next token": (0.01, 0.002),
    "blocks of 1": (0.01, 0.003),
    "blocks of 4": (0.02, 0.006),
    "whole rows": (0.02, 0.01),
  } | gaps
  return {
    f"{kind}, seed {s}": {
      "rate": 1e-3,
      "read": [32 * 16 * 100] if kind == "next token" else read,
      "gap": [
        g + JITTER[s] for g in (both[1:] if kind == "next token" else both)
      ],
    }
    for kind, both in ends.items()
    for s in range(3)
  }


def test_the_ladder_holds_as_a_theorist_would_like():
  assert holds(LADDER, ladder_rows()) == [True] * 5
  kinds = [line["kind"] for line in LADDER.table(ladder_rows())]
  assert kinds == list(LADDER.kinds)


@pytest.mark.parametrize(
  ("gaps", "number"),
  [
    ({"whole rows": (0.2, 0.01)}, 0),
    ({"whole rows": (0.2, 0.1)}, 1),
    ({"whole rows": (1.0, 0.9)}, 2),
    ({"blocks of 4": (0.02, 0.02)}, 3),
    ({"blocks of 1": (0.02, 0.0125)}, 4),
  ],
)
def test_the_ladder_falls(gaps, number):
  assert not holds(LADDER, ladder_rows(**gaps))[number]


def test_a_gap_at_equal_tokens_is_read_off_the_curve():
  row = {"read": [10, 1000], "gap": [1.0, 0.0]}
  # Halfway in log tokens.
  assert diffusion_study.at(row, "gap", 100) == pytest.approx(0.5)
  assert diffusion_study.at(row, "gap", None) == 0.0
  assert diffusion_study.marks(1000, 250, 3) == {250, 500, 1000}
  assert diffusion_study.marks(7, 250, 3) == {7}


# --- reversal ---

REVERSAL = reversal.Reversal()
RIGHT = {
  "next token": {
    "fact": 1.0,
    "template, told both": 1.0,
    "template, told once": 0.0,
    "scored": 0.0,
  },
  "diffusion": {
    "fact": 1.0,
    "template, told both": 1.0,
    "template, told once": 0.9,
    "gap": 1.0,
  },
}
REVERSED = {
  f"{kind}, seed {s}": {"right": dict(right)}
  for kind, right in RIGHT.items()
  for s in range(3)
}


def test_reversal_by_both_ways():
  assert holds(REVERSAL, REVERSED) == [True] * 5
  lines = REVERSAL.table(REVERSED)
  assert lines[1]["next token"] is None and lines[1]["diffusion"] == (100, 0)


@pytest.mark.parametrize(
  ("kind", "probe", "value", "number"),
  [
    ("next token", "fact", 0.9, 0),
    ("next token", "template, told once", 0.5, 1),
    ("diffusion", "gap", 0.5, 2),
    ("diffusion", "template, told once", 0.0, 3),
    ("next token", "scored", 1.0, 4),
  ],
)
def test_reversal_fails(kind, probe, value, number):
  arms = [f"{kind}, seed {s}" for s in range(3)]
  rows = changed(REVERSED, arms, ("right", probe), [value] * 3)
  assert not holds(REVERSAL, rows)[number]


# --- policies ---

POLICIES = policies.Policies(chain=SOURCE)


def policy_rows():
  """Points as they would be if all that is claimed were so."""

  def points(task):
    out = []
    for name, knob, *_ in POLICIES._ways(8, 16, 16):
      calls = 16 * knob if name == "ReMDM" else 16 / knob
      calls = 4.0 if name in ("threshold", "factor", "hierarchy") else calls
      point = {"policy": name, "knob": knob, "calls": float(calls)}
      point["tokens a call"] = 16 / point["calls"]
      if task == "sums":
        point["row"] = 0.3 if name == "random" else 1.0
        point["GFLOP"] = point["ms"] = point["calls"]
      else:
        biased = name == "low confidence"
        point["nats"] = ENTROPY * (0.5 if biased else 1.0)
        point["off"] = 0.3 if biased else 0.02 / (1 + point["calls"])
      out.append(point)
    return out

  return {arm: {"points": points(arm.split(",")[0])} for arm in POLICIES.arms}


def altered(rows, task, policy, name, value):
  out = copy.deepcopy(rows)
  for arm, row in out.items():
    for point in row["points"]:
      if arm.startswith(task) and point["policy"] == policy:
        point[name] = value
  return out


def test_policies_all_hold(tmp_path):
  rows = policy_rows()
  assert holds(POLICIES, rows) == [True] * 8
  assert len(POLICIES.table(rows)) == len(rows["chain, seed 0"]["points"])
  POLICIES.plot(rows, tmp_path, "policies")
  assert (tmp_path / "policies.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
  ("task", "policy", "name", "value", "number"),
  [
    ("sums", "random", "row", 1.0, 0),
    ("sums", "threshold", "row", 0.9, 1),
    ("sums", "factor", "tokens a call", 1.5, 2),
    ("sums", "threshold", "GFLOP", 20.0, 1),
    ("sums", "factor", "ms", 20.0, 2),
    ("the chain", "low confidence", "nats", ENTROPY, 3),
    ("the chain", "margin", "off", 0.2, 4),
    ("the chain", "ReMDM", "off", 0.2, 5),
    ("chain", "ReMDM", "off", 0.2, 6),
    ("chain", "ancestral", "off", 0.2, 7),
  ],
)
def test_policies_do_not(task, policy, name, value, number):
  rows = altered(policy_rows(), task, policy, name, value)
  assert not holds(POLICIES, rows)[number]


@pytest.mark.parametrize("name", ["off", "ms"])
def test_policies_differ_by_more_than_seeds_do(name):
  """As good on average, by one seed alone: nothing is shown."""
  rows = policy_rows()
  policy = "ReMDM" if name == "off" else "factor"
  arm = ("chain" if name == "off" else "sums") + ", seed 0"
  for point in rows[arm]["points"]:
    if point["policy"] == policy:
      point[name] -= 40.0
  other = arm.replace("0", "1")
  for point in rows[other]["points"]:
    if point["policy"] == policy:
      point[name] += 20.0 if name == "ms" else 0.02
  assert not holds(POLICIES, rows)[6 if name == "off" else 2]


# --- caches ---

CACHES = caches.Caches(chain=SOURCE)


def cache_rows(**more):
  drift = {"none": 0.0, "dual": 0.02, "vicinity": 0.01, "prefix": 0.005} | more
  points = [
    {
      "cache": cache,
      "block": block,
      "read": 8.0,
      "same": 1 - drift[cache] * block / 16,
      "right": 1 - 0.1 * drift[cache],
      "nats": 1.0,
      "off": 0.05 + 0.1 * drift[cache],
    }
    for cache in drift
    for block in CACHES.blocks
  ]
  return {arm: {"points": copy.deepcopy(points)} for arm in CACHES.arms}


@pytest.mark.parametrize(
  ("more", "wanted"),
  [
    ({}, [True, True, True, True, True]),
    ({"prefix": 0.0}, [False, True, True, False, True]),
    ({"dual": 0.2}, [True, False, False, True, True]),
    ({"prefix": 0.05}, [True, True, True, True, False]),
    (
      {"dual": 0.0, "vicinity": 0.0, "prefix": 0.0},  # nothing to bring back
      [False, True, True, False, False],
    ),
  ],
)
def test_caches(more, wanted):
  assert holds(CACHES, cache_rows(**more)) == wanted


def test_delayed_caches_have_rows_and_what_they_read():
  study = caches.Caches(
    chain=Markov(vocab=8, length=8),
    sums=tasks.Sums(length=4),
    blocks=(4, 8),
    renewals=(2,),
  )
  assert study.caches == ["dual", "vicinity", "prefix", "delayed 2"]
  # All at every second call, else masks and one more, in either block.
  want = ((4 + 8 + 2) + (8 + 8 + 6)) / 6
  assert study._read("delayed 2", 4, 8) == pytest.approx(want)
  study = dataclasses.replace(CACHES, renewals=(2,))
  rows = cache_rows(**{"delayed 2": 0.03})
  assert holds(study, rows) == [True, True, True, True, True]
  assert len(study.table(rows)) == 2 * 5


# --- ends ---

ENDS = diffusion_lengths.Ends()


def end_rows(**lengths):
  found = dict(low=5.0, last=11.0, blocks=9.5, chance=10.2) | lengths
  names = dict(zip(found, ("low confidence", "ends last", "blocks of 4",
                           "random places"), strict=True))  # fmt: skip
  row = {names[k]: {"length": x, "valid": 0.9} for k, x in found.items()}
  for way, length, valid in (
    ("low confidence", 2.0, 0.1),
    ("ends last", 8.0, 0.4),
    ("blocks of 4", 8.0, 0.1),
  ):
    row[f"{way}, greedy"] = {"length": length, "valid": valid}
  return {arm: copy.deepcopy(row) | {"want": 10.0} for arm in ENDS.arms}


@pytest.mark.parametrize(
  ("lengths", "number"),
  [
    ({"low": 9.0}, 0),
    ({"chance": 8.0}, 1),
    ({"last": 7.0}, 2),
    ({"last": 13.0}, 2),
    ({"blocks": 7.0}, 3),
  ],
)
def test_ends(lengths, number):
  assert holds(ENDS, end_rows()) == [True] * 6
  want = [True] * 6
  want[number] = False
  assert holds(ENDS, end_rows(**lengths)) == want
  path = ("ends last", "valid")
  rows = changed(end_rows(), ENDS.arms, path, [0.5] * 3)
  assert holds(ENDS, rows) == [True, True, True, True, False, True]
  for path, values, last in (
    (("low confidence, greedy", "length"), [9.0] * 3, False),
    (("ends last, greedy", "valid"), [0.1] * 3, False),
    # By one seed alone.
    (("ends last, greedy", "valid"), [0.9, 0.1, 0.1], None),
  ):
    rows = changed(end_rows(), ENDS.arms, path, values)
    assert holds(ENDS, rows) == [True] * 5 + [last]


# --- rewards ---

REWARDS = alignment.Rewards()


def reward_rows(one=0.9, coupled=0.99, lot=0.4, alike=1.5):
  ends = dict(zip(alignment.KINDS, (one, coupled, lot), strict=True))
  return {
    f"{kind}: seed {s}": {
      "reward": [0.4, end + JITTER[s]],
      "greedy": [0.4, end],
      "alike": [1.0, alike],
    }
    for kind, end in ends.items()
    for s in range(3)
  }


@pytest.mark.parametrize(
  ("more", "wanted"),
  [
    ({}, [True] * 5),
    ({"one": 0.4}, [None, True, True, True, True]),
    ({"lot": 0.6}, [True, False, True, True, True]),
    ({"coupled": 0.4}, [True, True, None, False, True]),
    ({"alike": 3.0}, [True, True, True, True, False]),
  ],
)
def test_rewards(more, wanted):
  assert holds(REWARDS, reward_rows(**more)) == wanted


# --- instructions ---

FOLLOWING = following.Following()


def following_rows(before=(2.0, 0.1), after=(0.1, 0.95), alone=(1.0, 0.5)):
  kinds = ("converted", "converted, tuned", "no base, tuned")
  return {
    arm: {
      kind: {"loss": loss + JITTER[s], "right": right + JITTER[s] * (i + 1)}
      for i, (kind, (loss, right)) in enumerate(
        zip(kinds, (before, after, alone), strict=True)
      )
    }
    for s, arm in enumerate(FOLLOWING.arms)
  }


@pytest.mark.parametrize(
  ("more", "wanted"),
  [
    ({}, [True] * 4),
    ({"before": (0.05, 0.1)}, [False, True, True, True]),
    ({"before": (2.0, 0.96)}, [True, False, True, True]),
    ({"after": (0.1, 0.8)}, [True, True, False, True]),
    ({"alone": (0.1, 0.95)}, [True, True, True, None]),
  ],
)
def test_following(more, wanted):
  assert holds(FOLLOWING, following_rows(**more)) == wanted


def _seeds_of(kind, separator=", "):
  return [f"{kind}{separator}seed {s}" for s in range(3)]


@pytest.mark.parametrize(
  ("study", "rows", "arms", "path", "values", "number"),
  [
    (
      *(LADDER, ladder_rows(), _seeds_of("whole rows"), ("gap", 1)),
      *((0.0, 0.01, 0.05), 1),
    ),
    (
      *(REVERSAL, REVERSED, _seeds_of("diffusion")),
      *(("right", "template, told once"), (0.9, 0.7, 0.3), 3),
    ),
    (
      *(ENDS, end_rows(), ENDS.arms, ("random places", "length")),
      *((8.0, 10.2, 12.4), 1),
    ),
    (
      *(ENDS, end_rows(), ENDS.arms, ("blocks of 4", "length")),
      *((3.0, 7.0, 11.0), 3),  # wrong in the mean, and not surely
    ),
    (
      *(REWARDS, reward_rows(), _seeds_of("coupled-GRPO", ": ")),
      *(("reward", 1), (0.95, 0.99, 0.8), 3),
    ),
    (
      *(REWARDS, reward_rows(), _seeds_of("diffu-GRPO", ": ")),
      *(("alike", 1), (1.0, 1.5, 3.0), 4),
    ),
    (
      *(FOLLOWING, following_rows(), FOLLOWING.arms),
      *(("converted, tuned", "right"), (0.99, 0.99, 0.8), 2),
    ),
    (
      *(POLICIES, policy_rows(), _seeds_of("sums")),
      *(("points", 16, "row"), (1.0, 0.3, 0.3), 0),
    ),
    (
      *(CACHES, cache_rows(), _seeds_of("chain")),
      *(("points", 7, "same"), (0.9975, 0.995, 0.99), 3),
    ),
  ],
)
def test_means_on_which_seeds_disagree_decide_nothing(
  study, rows, arms, path, values, number
):
  assert holds(study, changed(rows, arms, path, values))[number] is None


def test_gains_from_one_base_are_paired():
  """Seeds differ more than kinds, each of them by about as much."""
  rows, path = reward_rows(), ("reward", 1)
  for kind, ends in (
    ("diffu-GRPO", (0.5, 0.7, 0.9)),
    ("coupled-GRPO", (0.56, 0.75, 0.95)),
  ):
    rows = changed(rows, _seeds_of(kind, ": "), path, ends)
  assert holds(REWARDS, rows)[3] is True


def test_one_seed_is_no_interval():
  one = following.Following(seeds=1)
  assert not holds(one, following_rows())[0]
  assert math.isinf(one.mean_of(following_rows(), "converted", "loss").half)
