"""Published layouts of step labels: read strictly, written without loss.

The truth are files in those layouts (tests/golden/make_step_labels.py).
"""

import json
import pathlib

import pytest

from research.data.sources import jsonl
from research.errors import UserError
from research.prm import labels as makers
from research.prm.formats import (
  FORMATS,
  files,
  genprm,
  math_aps,
  prm800k,
  thinkprm,
)
from research.prm.formats.rlhflow import RLHFlow
from research.prm.formats.trl import tokenize
from research.prm.labelled import LabelledSolution
from research.reasoning.trace import MonteCarlo

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "step_labels"
STEPS = ("There are 3 x 4 = 12 figs.", "12 - 2 = 9.", "The answer is 9.")
SINGLE = [name for name, format in FORMATS.items() if format.single]


def _path(name):
  return str(GOLDEN / f"{name}.jsonl")


def _raw(name):
  lines = (GOLDEN / f"{name}.jsonl").read_text("utf-8").splitlines()
  return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", SINGLE)
def test_what_was_read_is_written(name, tmp_path):
  """Every field, those that the layout does not define included."""
  solutions = files.read(_path(name), FORMATS[name])
  files.write(str(tmp_path / "out.jsonl"), solutions, FORMATS[name])
  written = (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
  assert [json.loads(line) for line in written] == _raw(name)
  assert len(solutions) == len(_raw(name))


@pytest.mark.parametrize("name", FORMATS)
def test_records_pass_through_a_filter_untouched(name, tmp_path):
  path = str(tmp_path / "out.jsonl")
  files.write_records(path, files.records(_path(name)))
  assert pathlib.Path(path).read_text("utf-8") == (
    GOLDEN / f"{name}.jsonl"
  ).read_text("utf-8")


@pytest.mark.parametrize("name", FORMATS)
def test_a_solution_written_anew_is_the_same(name, tmp_path):
  """Without the record that it was read from; MATH-APS has one way each."""
  format = FORMATS[name]
  for solution in files.read(_path(name), format):
    if name == "prm800k" and not (
      0 in solution.labels or solution.final_correct
    ):
      with pytest.raises(UserError, match="final_correct"):
        format.values(solution)
      continue
    record = jsonl.Record(format.values(solution), "x:1")
    again = format.solutions(record)[0]
    assert (again.prompt, again.steps) == (solution.prompt, solution.steps)
    assert again.labels == solution.labels


FIRST_ERRORS = {
  "genprm": [1],
  "math_aps_flat": [1, None],
  "math_aps_process": [1, 1],
  "math_aps_tree": [None, None],
  "math_shepherd": [1, -1],
  "native": [1],
  "prmbench": [1, 2],
  "processbench": [1, -1],
  "rlhflow": [1],
  "thinkprm": [1],
  "trl": [1, 2],
}


@pytest.mark.parametrize("name", FIRST_ERRORS)
def test_first_errors_are_those_of_the_files(name):
  solutions = files.read(_path(name), FORMATS[name])
  assert [x.first_error for x in solutions] == FIRST_ERRORS[name]
  joined = " ".join(solutions[0].steps)
  assert all(step in joined for step in STEPS)


def test_prm800k_alternatives_follow_the_chosen_prefix_alone():
  found = files.read(_path("prm800k"), FORMATS["prm800k"])
  right = "12 - 2 = 10."
  assert [(x.steps, x.labels, x.final_correct) for x in found] == [
    # Phase 1: the labeller wrote the second step.
    ((STEPS[0], right, "# Answer\n\n10"), (1, 1, 1), True),
    (("Figs are sweet.",), (1,), None),
    ((STEPS[0], STEPS[1]), (1, 0), None),
    # Phase 2: labels end at the first error, where all are alternatives.
    ((STEPS[0], STEPS[1]), (1, 0), None),
    ((STEPS[0], right), (1, 1), None),
    ((STEPS[0], "I subtract."), (1, None), None),
  ]  # and nothing of the record of quality control
  apart = files.read(_path("prm800k"), prm800k.PRM800K(neutral=None))
  assert apart[1].labels == (None,)


def test_equal_prefixes_have_one_value():
  name = "math_aps_flat"
  (values, *_), format = _raw(name), FORMATS[name]
  again = values["reasoning_steps"][-1]
  values["reasoning_steps"].append(dict(again))
  assert format.solutions(jsonl.Record(values, "x:1")) == format.solutions(
    jsonl.Record(_raw(name)[0], "x:1")
  )
  values["reasoning_steps"][-1]["mc_value"] = again["mc_value"] / 2 + 0.1
  with pytest.raises(UserError, match="'mc_value': found .* as an equal"):
    format.solutions(jsonl.Record(values, "x:1"))


def test_maths_aps_trees_have_values_at_ends_of_nodes_alone():
  wrong, right = files.read(_path("math_aps_tree"), FORMATS["math_aps_tree"])
  assert wrong.labels == (0.75, None, 0.0)
  assert right.steps == (STEPS[0], "12 - 2 = 10.", "So 10.")
  assert right.labels == (0.75, None, 1.0)


@pytest.mark.parametrize("name", ["math_aps_flat", "math_aps_tree"])
@pytest.mark.parametrize(
  ("steps", "fits"),
  [
    (("a\nb", "c"), True),
    (("a\n\n", "b"), False),
    (("a", "b\n\nc"), False),
  ],
)
def test_maths_aps_gives_back_steps_or_refuses_them(name, steps, fits):
  """Steps that keep their separator would be read with empty ones between."""
  solution = LabelledSolution(prompt="q\n\nr", steps=steps, labels=(1, 0))
  if not fits:
    with pytest.raises(UserError, match="steps: found an empty line"):
      FORMATS[name].values(solution)
    return
  record = jsonl.Record(FORMATS[name].values(solution), "x:1")
  (again,) = FORMATS[name].solutions(record)
  assert (again.prompt, again.steps) == (solution.prompt, steps)
  assert again.labels == (1, 0)


@pytest.mark.parametrize("name", ["genprm", "rlhflow"])
def test_chats_need_a_step(name):
  for prompt in ("q", ""):
    empty = LabelledSolution(prompt=prompt, steps=(), labels=())
    with pytest.raises(UserError, match="steps: found none, expected one"):
      FORMATS[name].values(empty)


def test_openrs_example_has_another_tag_and_another_field():
  values = {
    "question": "1 + 1?",
    "process": "Step 1: 1 ки\nStep 2: 3 ки",
    "labels": [1, 0],
  }
  format = math_aps.MathAPSProcess(tag="ки", name="labels")
  (found,) = files.solutions_of(jsonl.Record(values, "x:1"), format)
  assert found.steps == ("Step 1: 1", "Step 2: 3")
  assert found.labels == (1, 0)
  assert format.values(found) == values


def test_rlhflow_parts_the_first_turn_where_problems_are_known():
  undivided = files.read(_path("rlhflow"), RLHFlow())[0]
  assert undivided.prompt == ""
  problem = "Ann has 3 bags of 4 figs and eats 2. How many are left?"
  format = RLHFlow(problems=("Ann has", problem))
  parted = files.read(_path("rlhflow"), format)[0]
  assert (parted.prompt, parted.steps) == (problem, STEPS)
  assert undivided.steps[0] == f"{problem} {STEPS[0]}"


@pytest.mark.parametrize(
  "labels",
  [[True, False], [1, 0], [1.0, 0.0], [0.5, 1.0], [0.5, 1], [0, 0]],
  ids=str,
)
def test_trls_labels_keep_their_type(labels):
  """A column of JSON that is true here and 0.5 there cannot be loaded."""
  values = {"prompt": "q", "completions": ["a", "b"], "labels": labels}
  (found,) = files.solutions_of(jsonl.Record(values, "x:1"), FORMATS["trl"])
  again = FORMATS["trl"].values(found)
  assert json.dumps(again["labels"]) == json.dumps(labels)
  with pytest.raises(UserError, match="'labels': found"):
    mixed = jsonl.Record(values | {"labels": [True, 1]}, "x:1")
    files.solutions_of(mixed, FORMATS["trl"])


def test_shares_of_rollouts_stay_numbers():
  """Of a file of soft labels, records in which all succeed as well."""
  solution = LabelledSolution(prompt="q", steps=("a", "b"), labels=(1, 0))
  counts = [MonteCarlo(4, 4), MonteCarlo(0, 4)]
  shares = solution.relabelled(makers.soft(counts), "monte_carlo_soft")
  assert FORMATS["trl"].values(solution)["labels"] == [True, False]
  assert json.dumps(FORMATS["trl"].values(shares)["labels"]) == "[1.0, 0.0]"


def test_labels_convert_between_layouts():
  """Math-Shepherd's labels in TRL's layout, as trl-lib/math_shepherd is."""
  solution = files.read(_path("math_shepherd"), FORMATS["math_shepherd"])[0]
  values = FORMATS["trl"].values(solution)
  assert values["labels"] == [True, False, False]
  assert values["completions"][0] == f"Step 1: {STEPS[0]}"
  assert values["task"] == "GSM8K"
  with pytest.raises(UserError, match=r"labels\[2\]: found None"):
    FORMATS["trl"].values(solution.relabelled((1, 0, None), "truncated"))
  with pytest.raises(UserError, match="critiques: found 0"):
    FORMATS["genprm"].values(solution)


def test_critiques_say_what_labels_say():
  critique = r"<output>\boxed{No}</output> <output> so \boxed{Yes} </output>"
  assert genprm.verdict(critique) == 1
  assert genprm.verdict(r"<output>\boxed{Yes} \boxed{No}</output>") is None
  assert genprm.verdict("<output><output>" * 5000) is None
  solution = files.read(_path("thinkprm"), FORMATS["thinkprm"])[0]
  assert thinkprm.agrees(solution)  # up to the first error, where it stops
  assert not thinkprm.agrees(solution.relabelled((1, 1, 1), "judge"))


def test_tokens_are_those_of_trl():
  """The example of TRL's PRMTrainer.tokenize_row, a character a token."""
  solution = LabelledSolution(prompt="ab", steps=("cd", "e"), labels=(1, 0))

  def encode(text):
    return [ord(x) for x in text]

  ids, labels = tokenize(solution, encode, "\n")
  assert ids == [97, 98, 99, 100, 10, 101, 10]
  assert labels == [-100, -100, -100, -100, 1, -100, 0]
  ids, labels = tokenize(solution, encode, "..", bos=1)
  assert (ids[0], labels[0]) == (1, -100)
  assert [i for i, x in enumerate(labels) if x != -100] == [6, 9]


def _edit(name, edit):
  values = _raw(name)[0]
  edit(values)
  return values


def _set(*keys, value):
  def edit(values):
    for key in keys[:-1]:
      values = values[key]
    values[keys[-1]] = value

  return edit


def _replace(name, old, new):
  def edit(values):
    assert old in values[name]
    values[name] = values[name].replace(old, new)

  return edit


def _twice(values):
  """An annotation error of the published set."""
  for name in ("input", "label"):
    values[name] = values[name].replace("Step 1: ", "Step 1: A. Step 1: ")


def _without_tag(after):
  """Returns an edit that takes the tag and the sign after a text away."""

  def edit(values):
    for name in ("input", "label"):
      start, stop = values[name].split(after)
      values[name] = start + after + stop[len(" -") + (name == "input") :]

  return edit


BAD = [
  ("trl", _set("labels", value=[True]), "labels: found 1 for 3 steps"),
  ("trl", _set("labels", value=[1, 2, 0]), r"labels\[1\]: found 2"),
  ("trl", _set("completions", 1, value=None), r"completions\[1\]"),
  ("trl", _set("prompt", value=[{"role": "user"}]), "'prompt'"),
  ("processbench", _set("label", value=3), "'label': found int '3'"),
  ("processbench", _set("label", value=True), "'label': found bool"),
  ("processbench", _set("final_answer_correct", value=1), "final_answer"),
  ("prmbench", _set("error_steps", value=[0]), r"error_steps\[0\]"),
  ("prmbench", _set("error_steps", value=[3, 2]), "in order"),
  ("rlhflow", _set("conversations", 1, "content", value="?"), "'-'"),
  ("rlhflow", _set("conversations", 1, "role", value="user"), "in turn"),
  ("rlhflow", _set("conversations", 1, "extra", value=1), "nothing else"),
  ("math_shepherd", _replace("label", "+", "?"), "after step 1"),
  ("math_shepherd", _twice, "2 times"),
  ("math_shepherd", _replace("input", "Step 1", "Step"), "0 times"),
  ("math_shepherd", _without_tag("= 12 figs."), "tag ки before .*Step 2: "),
  ("math_shepherd", _without_tag("12 - 2 = 9."), "tag ки before .*Step 3: "),
  ("math_shepherd", _set("label", value="Ann"), "after step 1"),
  ("genprm", _set("conversations", 0, "content", value="Hi"), "system"),
  ("genprm", _set("conversations", 2, "content", value="Yes"), "one "),
  ("genprm", _set("conversations", 1, "content", value="x"), "empty line"),
  ("thinkprm", _set("gt_step_labels", 0, value="1"), "one of '[+]', '-'"),
  ("native", _set("first_error", value=0), "1, as step_labels say"),
  ("native", _set("step_mc", 0, value={"c": 9, "k": 8}), r"mc\[0\]"),
  ("native", _set("step_mc", 0, value={"c": 1}), r"step_mc\[0\]"),
  ("prm800k", _set("label", "finish_reason", value="done"), "finish_reason"),
  (
    "prm800k",
    _set("label", "steps", 0, "chosen_completion", value=2),
    r"label.steps\[0\]: field 'chosen_completion': found int '2'",
  ),
  (
    "prm800k",
    _set("label", "steps", 0, "completions", 1, "rating", value=2),
    r"completions\[1\]: field 'rating': found int '2'",
  ),
  (
    "prm800k",
    _set("label", "steps", 1, "human_completion", value=None),
    "a step that goes on",
  ),
  ("math_aps_flat", _set("reasoning_steps", 1, "mc_value", value=2), "mc_v"),
  (
    "math_aps_flat",
    _set("reasoning_steps", 1, "solution_prefix", value="No"),
    "the question",
  ),
  ("math_aps_tree", _set("reasoning_steps", value=[]), "the root"),
  (
    "math_aps_tree",
    _set("reasoning_steps", "children", 0, "mc_value", value=None),
    r"children\[0\]: field 'mc_value'",
  ),
  ("math_aps_process", _set("label", value=["+", 1, 0]), "not both"),
  ("math_aps_process", _replace("process", " \n\n\n\n\n\n", "\n"), "for 1 st"),
]


@pytest.mark.parametrize(("name", "edit", "message"), BAD)
def test_a_bad_record_names_line_and_field(name, edit, message, tmp_path):
  good, bad = json.dumps(_raw(name)[0]), json.dumps(_edit(name, edit))
  path = tmp_path / "x.jsonl"
  path.write_text(f"{good}\n\n{bad}\n", "utf-8")
  with pytest.raises(UserError, match=rf"x.jsonl:3.*{message}"):
    files.read(str(path), FORMATS[name])
  found, skipped = files.read_valid(str(path), FORMATS[name])
  assert found == files.read(_path(name), FORMATS[name])[: len(found)] != []
  assert [x.where for x in skipped] == [f"{path}:3"]


def test_what_would_be_written_differently_is_refused(tmp_path):
  """Two spaces where the layout has one: steps would lose one silently."""
  values = _raw("math_shepherd")[0]
  for name in ("input", "label"):
    values[name] = values[name].replace("Step 2: ", "Step 2:  ")
  path = tmp_path / "x.jsonl"
  path.write_text(json.dumps(values), "utf-8")
  assert files.read(str(path), FORMATS["math_shepherd"])  # inside a step: fine
  values["input"] = values["input"].replace("\nStep 2", "\n Step 2")
  values["label"] = values["label"].replace("\nStep 2", "\n Step 2")
  path.write_text(json.dumps(values), "utf-8")
  with pytest.raises(UserError, match=r":1: field '(input|label)': found ' St"):
    files.read(str(path), FORMATS["math_shepherd"])


@pytest.mark.parametrize("text", ['{"a": NaN}', "[1]", '{"a": 1', "{}"])
def test_hostile_files_are_refused(text, tmp_path):
  for suffix in ("json", "jsonl"):
    path = tmp_path / f"x.{suffix}"
    path.write_text(text, "utf-8")
    with pytest.raises(UserError, match=str(path)):
      files.read(str(path), FORMATS["math_aps_tree"])
  with pytest.raises(UserError, match="cannot be read"):
    files.read(str(tmp_path / "none.json"), FORMATS["math_aps_tree"])


def test_one_object_a_file_as_omegaprm_writes_it(tmp_path):
  path = tmp_path / "question_0.json"
  path.write_text(json.dumps(_raw("math_aps_tree")[0], indent=4), "utf-8")
  found = files.read(str(path), FORMATS["math_aps_tree"])
  assert found == files.read(_path("math_aps_tree"), FORMATS["math_aps_tree"])


ODD = (None, True, -1, 0, 2.5, 10**30, "", "x", "\n\n", [], [[]], {}, {"a": 1})


def _places(value, place=()):
  """Yields the way to each value of a JSON object."""
  items = value.items() if isinstance(value, dict) else enumerate(value)
  for key, x in items:
    yield (*place, key)
    if isinstance(x, dict | list):
      yield from _places(x, (*place, key))


@pytest.mark.parametrize("name", FORMATS)
def test_any_value_in_any_place_is_read_or_refused(name):
  """Nothing but UserError leaves a reader, and what it reads it can write."""
  format, refused = FORMATS[name], 0
  for place in list(_places(_raw(name)[0])):
    for odd in ODD:
      values = _raw(name)[0]
      _set(*place, value=odd)(values)
      record = jsonl.Record(values, "x:1")
      try:
        found = files.solutions_of(record, format)
      except UserError as error:
        assert str(error).startswith("x:1")
        refused += 1
        continue
      assert all(isinstance(x, LabelledSolution) for x in found)
  assert refused > 20
