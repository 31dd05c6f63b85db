"""Questions of one's own: searches, labels and rewards ask and split alike."""

import json

import pytest

from experiments.core import config
from experiments.labelling.label_run import LabelRun
from experiments.searching.search_run import SearchRun
from research.typing import UserError
from tests.experiments.test_verified_runs import TINY

QUESTIONS = [
  {"question": f"How much is {i} and {i % 7}?", "answer": i + i % 7}
  for i in range(40)
]
MODEL = f"MODEL='{TINY}'"


@pytest.fixture
def files(tmp_path):
  path = tmp_path / "mine.jsonl"
  path.write_text("".join(json.dumps(x) + "\n" for x in QUESTIONS))
  return f"FILES='{path}'"


def read(name, root=None, *bindings):
  more = {} if root is None else {"root": root}
  return config.read(f"runs/{name}.gin", bindings, **more).experiment


def test_all_commands_ask_the_same_prompts(files):
  """A head learned from, or a policy trained on, prompts that none asks."""
  search = read("search/answers", SearchRun, files, MODEL, "PARTS=hash")
  labels = read("data/labels", LabelRun, files, MODEL)
  rewarded = read("data/rewarded", None, files, MODEL).data.task
  rows = read(
    "data/reward_model", None, MODEL, "LABELS=a.jsonl", "TEST=b.jsonl"
  ).data
  tokenizer = rewarded.vocabulary.load()
  question = QUESTIONS[0]["question"]
  asked = [
    list(prompting(tokenizer, question))
    for prompting in (search.prompting, labels.prompting, rows.prompting)
  ]
  asked.append(list(rewarded.prompt(rewarded.task[0]).tokens))
  first = rewarded.task[0].prompt
  assert asked[3] == list(search.prompting(tokenizer, first))
  assert asked[0] == asked[1] == asked[2]
  # A reward model judges what the search samples, so it learns from the same.
  assert labels.sampling == search.sampling
  assert labels.new_tokens == search.new_tokens


def test_no_question_is_learned_and_searched(files):
  search = read("search/answers", SearchRun, files, "PARTS=hash").task
  learned = read("data/labels", LabelRun, files).task
  rewarded = read("data/rewarded", None, files).data.task.task
  test = read("data/labels", LabelRun, files, "SPLIT=heldout").task
  prompts = [
    {x.prompt for x in task} for task in (search, learned, rewarded, test)
  ]
  assert prompts[0] == prompts[3] and prompts[1] == prompts[2]
  assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


@pytest.mark.parametrize(
  ("name", "root"),
  [
    ("search/answers", SearchRun),
    ("data/labels", LabelRun),
    ("data/rewarded", None),
  ],
)
def test_questions_without_answers_need_a_reward(name, root, files):
  """What cannot be judged would be wrong throughout, hours later."""
  bindings = files, MODEL, "ANSWER=None"
  with pytest.raises(UserError, match="expected the field with the answers"):
    read(name, root, *bindings)


def test_a_reward_needs_no_answers(files):
  reward = "reasoning_tasks.VerifiedTask.reward_fn=@extraction.last_number"
  task = read("data/rewarded", None, files, "ANSWER=None", reward).data.task
  assert task.task[0].answer is None


def test_by_default_all_questions_are_searched(files):
  search = read("search/answers", SearchRun, files)
  assert search.problems == (0, 40) == (0, len(search.task))
  labels = read("data/labels", LabelRun, files)
  assert labels.problems == (0, len(labels.task)) != (0, 40)
