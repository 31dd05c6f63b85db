"""Sample logs, against a file that lm-evaluation-harness wrote."""

import json
import pathlib

import pytest

from research.errors import UserError
from research.reasoning import read_samples, write_samples
from research.reasoning.sample_logs import SampleLog, sample_of
from research.reasoning.tasks import Chain

GOLDEN = pathlib.Path(__file__).parents[2] / "golden/lm_eval_samples.jsonl"


def rows(path):
  """Returns the objects of a file."""
  return [json.loads(x) for x in path.read_text("utf-8").splitlines()]


def test_the_harness_log_is_read_and_written_without_loss(tmp_path):
  samples = read_samples(str(GOLDEN))
  assert [x.to_json() for x in samples] == rows(GOLDEN)
  write_samples(str(tmp_path / "samples.jsonl"), samples)
  assert rows(tmp_path / "samples.jsonl") == rows(GOLDEN)
  assert [x.name for x in tmp_path.iterdir()] == ["samples.jsonl"]
  first = samples[0]
  assert first.filter == "strict-match"
  assert first.responses == ("3 + 4 = 7\n#### 7", "I guess 8.")
  assert first.filtered == "7"
  assert first.prompt == "Question: 3 + 4?\nAnswer:"
  assert first.generation["temperature"] == 0.5
  assert first.metrics == {"exact_match": 1.0}
  assert samples[-1].filter == "maj@2"
  assert samples[-1].filtered == "[invalid]"


def test_our_samples_have_the_fields_of_the_harness(tmp_path):
  task = Chain(count=2)
  samples = []
  for i, problem in enumerate(task):
    texts = [task.oracle(problem), task.mutated(problem), "nothing"]
    verdicts = [task.verify(problem, x) for x in texts]
    samples.append(sample_of(i, problem, texts, verdicts, {"temperature": 1.0}))
  path = str(tmp_path / "samples_chain_1.jsonl")
  write_samples(path, samples)
  assert read_samples(path) == samples
  ours, theirs = samples[0].to_json(), rows(GOLDEN)[0]
  assert list(ours)[:11] == list(theirs)[:11]
  [filtered] = ours["filtered_resps"]
  assert filtered[0] == task[0].answer
  assert filtered[2] == "[invalid]"
  assert ours["exact_match"] == 1
  assert ours["mean_correct"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"resps": [["a"], ["b"]]}, "found 2 requests for one document"),
    ({"doc_id": "0"}, "F:1: field 'doc_id': found '0', expected int"),
    ({"arguments": [["p", {}]]}, "field 'arguments'"),
    ({"resps": [[1.5]]}, "field 'resps': found 1.5, expected text"),
    ({"target": None}, "field 'target'"),
  ],
)
def test_other_layouts_are_refused(change, message):
  with pytest.raises(UserError, match=message):
    SampleLog.from_json(rows(GOLDEN)[0] | change, "F:1")


def test_a_metric_cannot_hide_a_field():
  [problem] = Chain(count=1)
  doc = problem.to_json()
  sample = SampleLog(0, doc, "1", "?", ("1",), "1", {"doc": 1.0})
  with pytest.raises(UserError, match="found 'doc', a field's name"):
    sample.to_json()
  with pytest.raises(UserError, match="found 1 texts and 0 verdicts"):
    sample_of(0, problem, ["1"], [])
