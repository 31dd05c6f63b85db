"""Writes randperm.json: where permutations of torch begin, short and long ones.

  .venv-peers/bin/python tests/golden/make_randperm.py [--to FILE]

From a twentieth of 2³² numbers on torch permutes by another algorithm. Of each
length the file has the first numbers of `randperm`, by seed; a permutation of
such a length takes 2 GB and a minute. `inside_out` is the other algorithm at a
small length, where torch itself uses the first one: written here as torch has
it (`randperm_cpu` in aten/src/ATen/native/TensorFactories.cpp).
"""

import argparse
import json
import pathlib

import torch

BOUND = (2**32 - 1) // 20
"""The first length of the second algorithm."""

LENGTHS = {BOUND - 1: [777], BOUND: [777, 5]}
SHOWN = 40
SMALL, SEEDS = 1000, [0, 777]


def generator(seed: int) -> torch.Generator:
  return torch.Generator().manual_seed(seed)


def random64(seed: int, count: int) -> list[int]:
  """Returns 64-bit draws of a seed."""
  out = torch.empty(count, dtype=torch.int64)
  return out.random_(-(2**63), None, generator=generator(seed)).tolist()


def inside_out(seed: int, length: int) -> list[int]:
  """Returns a permutation by torch's second algorithm."""
  out: list[int] = []
  for i, number in enumerate(random64(seed, length)):
    place = number % 2**64 % (i + 1)
    out.append(i)
    out[i] = out[place]
    out[place] = i
  return out


def facts() -> dict:
  """Returns what the file holds."""
  return dict(
    bound=BOUND,
    inside_out={seed: inside_out(seed, SMALL) for seed in SEEDS},
    randperm={
      length: {
        seed: torch.randperm(length, generator=generator(seed))[:SHOWN].tolist()
        for seed in seeds
      }
      for length, seeds in LENGTHS.items()
    },
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  place = pathlib.Path(__file__).with_name("randperm.json")
  parser.add_argument("--to", type=pathlib.Path, default=place)
  args = parser.parse_args()
  torch.set_num_threads(1)
  text = json.dumps(facts(), separators=(",", ":"))
  args.to.write_text(text + "\n")
  print(len(text), "characters")


if __name__ == "__main__":
  main()
