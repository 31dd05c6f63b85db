"""Writes grading.json and lm_eval_samples.jsonl: what others' graders say.

  git clone https://github.com/openai/prm800k PRM  (7ecc794)
  python3.11 -m venv VENV
  VENV/bin/pip install lm-eval==0.4.13 sympy==1.14.0 pylatexenc==2.11
  VENV/bin/python tests/golden/make_grading.py --prm800k=PRM [--to FOLDER]

The grader of PRM800K judges every ordered pair within groups of answers that
resemble each other. lm-evaluation-harness' filters and metric of gsm8k judge
texts, and it logs the samples of a task with two documents, two repeats and
these filters.
"""

import argparse
import itertools
import json
import pathlib
import sys
import tempfile

GROUPS = (
  ("3", "3.0", "3.", "03", "$3$", "3\\%", "6/2", "2+1", "\\text{3}", "x=3"),
  ("1/2", "\\frac{1}{2}", "\\frac12", "\\dfrac{1}{2}", "0.5", ".5", "2/4"),
  ("1/2", "50\\%", "50", "0.50", "\\tfrac12", "-1/2", "1/3"),
  (
    "1,234",
    "1234",
    "1,23",
    "12,34",
    "1{,}234",
    "1,\\!234",
    "$1,234$",
    "1234.0",
  ),
  ("7 3/4", "7\\frac{3}{4}", "31/4", "7.75", "7+3/4", "73/4", "-7 3/4"),
  ("(1,2)", "(1, 2)", "[1,2]", "(1,2]", "(2,1)", "1,2", "(1,2.0)", "(1,4/2)"),
  ("5", "5 cm", "5\\text{ cm}", "5 cm^2", "5^\\circ", "5 degrees", "5 miles"),
  ("3 million", "3000000", "3,000,000", "3", "3 billion"),
  ("x+1", "1+x", "x + 1", "X+1", "y+1", "x-1", "(x+1)"),
  ("\\sqrt{2}", "\\sqrt2", "sqrt(2)", "2^{1/2}", "1.414", "\\sqrt{3}"),
  ("2\\pi", "2pi", "\\pi\\cdot 2", "pi", "6.28"),
  ("\\text{Monday}", "monday", "Monday", "Tuesday", "\\textbf{Monday}"),
  ("3 or 4", "3", "4", "3,4", "4 or 3"),
  ("\\frac{x+1}{2}", "(x+1)/2", "x+1/2", "\\frac{1+x}{2}", "x/2+1/2"),
  ("10^{10}", "10000000000", "10^10", "1e10"),
  ("", "0", "-0", "0.0", "\\emptyset"),
)
TEXTS = (
  "He has 3 + 4 = 7 apples.\n#### 7",
  "#### 1,234",
  "#### -5.50 dollars",
  "#### $12",
  "The answer is 12.",
  "So $1,000.50 in all.",
  "x = -3, y = 4",
  "nothing here",
  "ends with dots ...",
  "#### 3\n#### 4",
  "####5",
  "price: $5.",
  "7 of 10%",
  "",
  "#### ",
  "1.2.3",
)
TARGETS = ("7", "1234", "-5.50", "12", "1000.50", "4", "3", "5", "10", "#### 7")


def prm800k(folder: str) -> list:
  """Returns [truth, given, verdict] of PRM800K's grader."""
  sys.path.insert(0, f"{folder}/prm800k")
  from grading import grader

  pairs = dict.fromkeys(
    pair for x in GROUPS for pair in itertools.product(x, repeat=2)
  )
  return [[a, b, bool(grader.grade_answer(b, a))] for a, b in pairs]


def gsm8k() -> dict:
  """Returns what the filters of gsm8k extract, and what its metric says."""
  from lm_eval.api.metrics import exact_match_hf_evaluate
  from lm_eval.filters.extraction import RegexFilter

  filters = {
    "strict": RegexFilter(r"#### (\-?[0-9\.\,]+)"),
    "flexible": RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
  }
  ignored = [",", "\\$", "(?s).*#### ", "\\.$"]
  extracted = {
    name: [x.apply([[text]], [{}])[0][0] for text in TEXTS]
    for name, x in filters.items()
  }
  given = dict.fromkeys([*extracted["strict"], *extracted["flexible"]])
  metric = [
    [
      target,
      answer,
      float(
        exact_match_hf_evaluate(
          predictions=[answer],
          references=[target],
          regexes_to_ignore=ignored,
          ignore_case=True,
        )["exact_match"]
      ),
    ]
    for target in TARGETS
    for answer in given
  ]
  return {"texts": TEXTS, **extracted, "exact_match": metric}


def samples() -> str:
  """Returns the sample log of a task, as the harness writes it."""
  import lm_eval
  from lm_eval.api.model import LM
  from lm_eval.api.task import ConfigurableTask
  from lm_eval.loggers import EvaluationTracker

  texts = ["3 + 4 = 7\n#### 7", "I guess 8.", "no idea", "größer: #### 1,234"]

  class Canned(LM):
    """Answers in turn."""

    def generate_until(self, requests, disable_tqdm=False):
      return [texts[i % len(texts)] for i in range(len(requests))]

    def loglikelihood(self, requests, disable_tqdm=False):
      raise NotImplementedError

    loglikelihood_rolling = loglikelihood

  import datasets

  docs = [
    {"question": "3 + 4?", "answer": "add\n#### 7"},
    {"question": "Größe?", "answer": "#### 1,234"},
  ]
  task = ConfigurableTask(
    config={
      "task": "toy",
      "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(docs)},
      "test_split": "test",
      "output_type": "generate_until",
      "doc_to_text": "Question: {{question}}\nAnswer:",
      "doc_to_target": "{{answer}}",
      "repeats": 2,
      "generation_kwargs": {
        "until": ["Question:"],
        "do_sample": True,
        "temperature": 0.5,
      },
      "metric_list": [
        {
          "metric": "exact_match",
          "ignore_case": True,
          "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
        }
      ],
      "filter_list": [
        {
          "name": "strict-match",
          "filter": [
            {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
            {"function": "take_first"},
          ],
        },
        {
          "name": "maj@2",
          "filter": [
            {"function": "take_first_k", "k": 2},
            {
              "function": "regex",
              "group_select": -1,
              "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)",
            },
            {"function": "majority_vote"},
            {"function": "take_first"},
          ],
        },
      ],
    }
  )
  found = lm_eval.simple_evaluate(
    model=Canned(), tasks=[task], log_samples=True, bootstrap_iters=0
  )
  with tempfile.TemporaryDirectory() as folder:
    tracker = EvaluationTracker(output_path=f"{folder}/out.json")
    tracker.save_results_aggregated(found, found["samples"])
    tracker.save_results_samples("toy", found["samples"]["toy"])
    [file] = pathlib.Path(folder).glob("samples_toy_*.jsonl")
    return file.read_text("utf-8")


def main() -> None:
  """Writes both files."""
  parser = argparse.ArgumentParser()
  parser.add_argument("--prm800k", required=True)
  parser.add_argument("--to", default=str(pathlib.Path(__file__).parent))
  args = parser.parse_args()
  folder = pathlib.Path(args.to)
  values = {"prm800k": prm800k(args.prm800k), "gsm8k": gsm8k()}
  (folder / "grading.json").write_text(
    json.dumps(values, separators=(",", ":"), ensure_ascii=False) + "\n",
    encoding="utf-8",
  )
  (folder / "lm_eval_samples.jsonl").write_text(samples(), encoding="utf-8")


if __name__ == "__main__":
  main()
