"""The pages' numbers of D1 to D4 are those that were measured.

Tables are rendered from the results of studies (`test_results.py`); sentences
are written from them here.
"""

import functools
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNS = ROOT / "configs" / "runs" / "llada"


@functools.cache
def page(name="RESULTS"):
  return (ROOT / "research" / "diffusion" / f"{name}.md").read_text("utf-8")


@functools.cache
def results(name):
  return json.loads((RUNS / "results" / f"{name}.json").read_text("utf-8"))


def parsed(text):
  """Returns a cell as the results have it: None, a number, a pair, or text."""
  text = text.strip()
  if not text:
    return None
  both = [x.replace(",", "") for x in text.split(" ± ")]
  if not all(re.fullmatch(r"-?[\d.]+", x) for x in both):
    return text
  found = [float(x) for x in both]
  return found if len(found) == 2 else found[0]


def cells(line):
  return [x.strip() for x in line.strip().strip("|").split("|")]


def shown(header, name="RESULTS"):
  """Returns the rows of a page's only table with such a header."""
  lines = page(name).split("\n")
  [start] = [
    i
    for i, line in enumerate(lines)
    if line.startswith("| ") and cells(line) == header
  ]
  out = []
  for line in lines[start + 2 :]:
    if not line.startswith("|"):
      return out
    # An empty cell at the end is one, too.
    out.append([parsed(x) for x in line.strip()[1:-1].split("|")])
  return out


def at(name, row, column, knob=None):
  """Returns a cell of a study's table, by its row's name and its column's.

  Args:
    name: of the study.
    row: what its first cell says; those without a name have the one above.
    column: what its header says, the first of those of a name, or a number.
    knob: of rows with a name, what their second cell says.
  """
  [table] = results(name)["tables"]
  place = column
  if isinstance(column, str):
    place = table["header"].index(column)
  label, found = None, []
  for cell in table["rows"]:
    label = cell[0] or label
    if label == row and knob in (None, cell[1]):
      found.append(cell[place])
  [value] = found
  return value


def pair(value, digits=0, unit=""):
  mean, half = value
  return f"{mean:.{digits}f} ± {half:.{digits}f}{unit}"


def d1():
  numbers = results("claims_ar")["numbers"]
  plain = at("claims_text", "next token", "bits a byte")[0]
  equal, longer = (
    at("claims_text", "diffusion", "bits a byte", knob)[0]
    for knob in ("1.23 M", "4.92 M")
  )
  unigrams = at("claims_text", "unigrams, counted", "bits a byte")
  first, last = (
    numbers[f"percent_behind_at_{when}"] for when in ("equal_flops", "the_end")
  )
  entropy, uniform = numbers["entropy"], numbers["uniform_gap"]
  left = at("claims_ar", "whole rows", "gap at the end")[0]
  text = results("claims_text")["numbers"]
  return [
    f"on a Markov chain {first}% of the entropy behind at equal FLOPs, {last}%"
    f" after six times the tokens; not on real text: {equal / plain - 1:.0%}"
    " behind",
    f"(entropy {entropy} nats a token)",
    f"At equal FLOPs diffusion is {pair(numbers['behind_at_equal_flops'], 3)}"
    f" behind, {first}% of the entropy; after six times the tokens {last}%.",
    f"whole rows have learned {1 - left / uniform:.1%}"
    f" ({uniform - left:.3f} of {uniform})",
    f"({1 - longer / unigrams:.0%} below unigrams, and still falling)",
    f"it is {equal / plain - 1:.0%} behind, with four times the tokens"
    f" {longer / plain - 1:.0%}",
    f"had after {text['million_tokens_of_next_token_as_good']} M, a tenth",
    f"own error is {text['bound_error_at_most']} at most",
  ]


def d2():
  name, label = "claims_reversal", "`fact WAS ?`, trained one way"
  share = pair(at(name, label, "diffusion"))
  few = results(name)["numbers"]["percent_of_120_longer_facts"]
  gap = at(name, "`? IS fact`", "diffusion")
  return [
    f"holds: names before a fact are filled in correctly, {gap:.0f}% | with a"
    f" new template {share}%; of 120 longer facts only {few}% are learned",
    f"with 120 pairs of three tokens the same model learned {few}% of them",
  ]


def d3():
  sft = results("claims_sft")["numbers"]
  smol = results("sft_smollm2")["numbers"]
  plain = smol["plain_text"]
  before, after, without = (
    pair(sft[f"percent_right_{when}"], 1)
    for when in ("before", "after", "without_a_base")
  )
  return [
    "holds for converted models: they use a context on either side, and follow"
    f" {sft['percent_right_after'][0]}% of a toy task's instructions",
    f"is right in {before}% of held-out prompts at {sft['nats_before']:.2f}"
    f" nats a token; fine-tuned in {after}% at {sft['nats_after']}",
    f"base reach {without}%:",
    f"(chance {results('claims_incontext')['numbers']['chance']})",
    f"bound falls from {plain['converted']} to {pair(plain['adapted'], 2)} nats"
    " a token",
    f"that it was has {plain['next_token']}, and"
    f" {pair(plain['next_token_adapted'], 2)} after",
    f"({smol['tokens_read']:,} tokens are read by then;",
    f"{smol['verdicts']['hold']} of {smol['verdicts']['of']} verdicts hold",
  ]


def d4():
  numbers, name = results("claims_policies")["numbers"], "claims_policies"
  half, each = numbers["factor_half"], numbers["factor_half_by_model"]
  most, middle, least = each["tokens_a_call"]
  low, by_chance = "low confidence", "random places"
  right = {
    (row, calls): at(name, row, "right %", knob)[0]
    for row in (low, by_chance)
    for calls, knob in ((14, 32), (4, 8))
  }
  quota = at(name, low, "right %", 8)
  off = [at(name, "ancestral", 5, 32)[0]]
  off += [at(name, "ReMDM", 5, calls)[0] for calls in (64, 128)]
  more = numbers["more_off_by_two_tokens_a_call"]
  itself = [at(name, row, 3, 32)[0] for row in (by_chance, "margin", "entropy")]
  said = [numbers["threshold_nine_tenths_percent_right_by_model"]]
  said.insert(0, each["percent_right"])
  first, second = (f"{a:g}, {b:g} and {c:g}%" for a, b, c in said)
  return [
    f"where answers are certain, {least:.1f} to {most} tokens per call, by"
    " model",
    f"(entropy {numbers['entropy']} nats a token), by the chain's own",
    f"{right[low, 14]:.0f} and {right[by_chance, 14]:.0f}% at 14 calls,"
    f" {right[low, 4]:.0f} and {right[by_chance, 4]:.0f}% at 4",
    f"factor 0.5: {most}, {middle} and {least} tokens a call in three models,"
    f" {first} right, for {half['gflop']} of"
    f" {at(name, low, 'GFLOP a row', 32)} GFLOP and {half['ms']} of"
    f" {half['ms_of_a_token_a_call']} ms a row; threshold 0.9 as many,"
    f" {second}. A fixed quota at as many calls {pair(quota)}%",
    f"rows of {at(name, low, 2, 32):.2f} nats where the entropy is"
    f" {numbers['entropy']:.2f}",
    f"{min(itself):.3f} to {max(itself):.3f} off, first hitting"
    f" {at(name, 'first hitting', 3)[0]:.3f}",
    f"models, random order: {pair(more['random_models'], 3)} more off; the"
    f" chain's own conditionals: random {more['random_itself']} more, margin"
    f" {more['margin_itself']};",
    f"models: {off[0]:.3f}, {off[1]:.3f}, {off[2]:.3f} off at 32, 64, 128"
    f" calls, less by {pair(numbers['remdm_less_off'], 3)};",
  ]


@pytest.mark.parametrize("claim", [d1, d2, d3, d4], ids=lambda f: f.__name__)
def test_sentences_say_the_results(claim):
  text = " ".join(page().split())
  for sentence in claim():
    assert sentence in text


def test_the_readme_has_the_same_verdicts():
  header = ["claim of LLaDA", "verdict here", "where it stops"]
  assert len(shown(header)) == 4
  assert shown(header, "README") == shown(header)


def test_shares_are_of_what_they_say():
  """Those that were rounded by themselves: of numbers rounded to 0.001."""
  numbers = results("claims_ar")["numbers"]
  for when in ("equal_flops", "the_end"):
    share = 100 * numbers[f"behind_at_{when}"][0] / numbers["entropy"]
    slack = 0.05 + 100 * 0.0005 / numbers["entropy"]
    assert abs(share - numbers[f"percent_behind_at_{when}"]) <= slack


def test_run_files_expect_the_results():
  name = "claims_reversal"
  told = pair(at(name, "`fact WAS ?`, trained one way", "diffusion"))
  behind = results("claims_ar")["numbers"]
  sft = results("claims_sft")["numbers"]
  bits = [
    at("claims_text", *row)
    for row in (
      ("next token", "bits a byte"),
      ("diffusion", "bits a byte", "1.23 M"),
      ("diffusion", "bits a byte", "4.92 M"),
    )
  ]
  unigrams = at("claims_text", "unigrams, counted", "bits a byte")
  before, after = (
    at("claims_incontext", "diffusion from scratch", column)[0]
    for column in ("8 before", "8 after")
  )
  expected = {
    "claims_ar": [
      f"whole rows {behind['behind_at_equal_flops'][0]:.3f} nats behind",
      f"{pair(behind['behind_at_the_end'], 3)} after six times",
    ],
    "claims_text": [
      f"next token {bits[0][0]} bits a byte, diffusion {bits[1][0]} of as many"
      f" tokens and {bits[2][0]} of four times as many, unigrams {unigrams}"
    ],
    name: [f"the new template {told}% by diffusion"],
    "claims_incontext": [
      f"one from scratch in {before:.0f}% (before) and {after:.0f}% (after)"
    ],
    "claims_sft": [
      f"{sft['percent_right_before'][0]}% right before,"
      f" {pair(sft['percent_right_after'], 1)}% after"
    ],
  }
  for run, sentences in expected.items():
    text = (RUNS / f"{run}.gin").read_text("utf-8").replace("\n#", " ")
    for sentence in sentences:
      assert sentence in " ".join(text.split())
