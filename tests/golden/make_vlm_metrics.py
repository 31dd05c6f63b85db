"""Writes vlm_metrics.json: what lmms-eval scores.

  git clone https://github.com/EvolvingLMMs-Lab/lmms-eval LMMS  (75571cf)
  python tests/golden/make_vlm_metrics.py --lmms=LMMS [--to FILE]

Functions are taken out of lmms-eval's files by name, as the files import what
only whole runs need. Texts come from a seed: words, figures, contractions and
all punctuation; answers are mutations of each other, so that some agree.
"""

import argparse
import ast
import collections
import json
import pathlib
import random
import re
import statistics

TASKS = "lmms_eval/tasks"
WORDS = (
  *("a", "An", "the", "one", "Two", "ten", "none", "eleven", "red", "cats"),
  *("man's", "dont", "don't", "couldnt've", "somebody'd", "3.5", "1,000", "7"),
  *("U.S.", "5 p.m.", "black-and-white", "yes", "No", "x/y", "50%", "'ow'sat"),
)
MARKS = tuple(";/[]\"{}()=+\\_-><@`,?!.:'")


def functions(path: pathlib.Path, *names: str, **known) -> dict:
  """Returns functions and classes of a file, without running the rest."""
  tree = ast.parse(path.read_text("utf-8"))
  body = [
    node
    for node in tree.body
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names
  ]
  for node in body:
    node.decorator_list = []
  code = compile(ast.Module(body, []), str(path), "exec")
  exec(code, known)
  return known


def texts(rng: random.Random, count: int) -> list[str]:
  """Returns texts of words and marks, joined with and without spaces."""
  out = []
  for _ in range(count):
    parts = [rng.choice(WORDS) for _ in range(rng.randint(1, 4))]
    for _ in range(rng.randint(0, 3)):
      parts.insert(rng.randint(0, len(parts)), rng.choice(MARKS))
    joined = "".join(x + rng.choice(("", " ", " ")) for x in parts)
    out.append(joined if rng.random() < 0.8 else f" {joined}\n")
  return out


def normal_forms(root: pathlib.Path, rng: random.Random) -> dict:
  path = root / TASKS / "_task_utils" / "vqa_eval_metric.py"
  cls = functions(path, "EvalAIAnswerProcessor", re=re)["EvalAIAnswerProcessor"]
  forms = cls()
  inputs = texts(rng, 160)
  inputs += [f"He {word} it." for word in cls.CONTRACTIONS]
  inputs += [" ".join(cls.NUMBER_MAP), "a.b " * 40, "1,000,000 a-b", ""]

  def vqa_v2(text):
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return forms.process_digit_article(forms.process_punctuation(text))

  return {"evalai": [[x, forms(x), vqa_v2(x)] for x in inputs]}


def vqa(root: pathlib.Path, rng: random.Random) -> dict:
  path = root / TASKS / "_task_utils" / "vqa_eval_metric.py"
  cls = functions(path, "EvalAIAnswerProcessor", re=re)
  known = dict(statistics=statistics, **cls)
  path = root / TASKS / "textvqa" / "utils.py"
  score = functions(path, "textvqa_process_results", **known)
  rows = []
  for _ in range(40):
    pool = texts(rng, 3)
    answers = [rng.choice(pool) for _ in range(10)]
    prediction = rng.choice([*pool, pool[0].upper(), "nothing"])
    doc = {"answers": list(answers), "question_id": 0}
    found = score["textvqa_process_results"](doc, [prediction])
    rows.append([prediction, answers, found["exact_match"]])
  return {"vqa": rows}


def documents(root: pathlib.Path, rng: random.Random) -> dict:
  path = root / "lmms_eval/api/metrics.py"
  anls = functions(path, "levenshtein_distance", "anls")["anls"]
  rows = []
  for _ in range(60):
    answers = texts(rng, rng.randint(1, 3))
    letters = list(rng.choice(answers))
    for _ in range(rng.randint(0, len(letters) // 2 + 1)):
      letters[rng.randrange(len(letters))] = rng.choice("abc 1")
    prediction = "".join(letters)
    rows.append([prediction, answers, anls(answers, [prediction])["anls"]])
  rows.append(["", ["word"], anls(["word"], [""])["anls"]])
  return {"anls": rows}


def charts(root: pathlib.Path, rng: random.Random) -> dict:
  path = root / TASKS / "chartqa" / "utils.py"
  relaxed = functions(path, "relaxed_correctness")["relaxed_correctness"]
  numbers = ["0", "12", "12.5", "-3", "1e3", "7%", "0.07", "1,000", "Yes", "no"]
  rows = []
  for answer in numbers:
    for prediction in (answer, answer.upper(), "12.6", "12.7", "0.0", "7", ""):
      rows.append([prediction, answer, bool(relaxed(prediction, answer))])
  return {"relaxed": rows}


def yes_no(root: pathlib.Path, rng: random.Random) -> dict:
  names = ("accuracy", "precision", "recall", "f1_score")
  path = root / TASKS / "pope" / "utils.py"
  pope = functions(path, *(f"pope_aggregate_{x}" for x in names))
  path = root / TASKS / "mme" / "utils.py"
  known = dict(
    defaultdict=collections.defaultdict, eval_logger=Quiet(), eval_type_dict={}
  )
  mme = functions(path, "parse_pred_ans", "mme_aggregate_results", **known)
  rows = []
  for share in (0.2, 0.5, 0.9):
    truth = [rng.choice(("yes", "no")) for _ in range(30)]
    said = [x if rng.random() < share else rng.choice(truth) for x in truth]
    results = [
      {"score": float(a == b), "prediction": a, "ground_truth": b}
      for a, b in zip(said, truth, strict=True)
    ]
    scores = [pope[f"pope_aggregate_{x}"](results) for x in names]
    rows.append([said, truth, scores])
  answers = [
    [category, str(image), rng.random() < 0.7]
    for category in ("existence", "count", "code_reasoning")
    for image in range(6)
    for _ in range(2)
  ]
  total = mme["mme_aggregate_results"](
    [
      {"category": category, "question_id": image, "score": float(right)}
      for category, image, right in answers
    ]
  )
  said = [
    "Yes",
    "no.",
    "Y",
    "n",
    "x",
    "Yes, it is",
    "Not",
    "I know",
    "",
    "yeno",
  ]
  parsed = [[x, mme["parse_pred_ans"](x)] for x in said]
  return {"pope": rows, "mme": [answers, total], "mme_parser": parsed}


class Quiet:
  """A logger that logs nothing."""

  def info(self, text: str) -> None:
    """Drops a text."""


def boxes(root: pathlib.Path, rng: random.Random) -> dict:
  path = root / TASKS / "refcoco" / "utils_rec.py"
  iou = functions(path, "compute_iou")["compute_iou"]
  rows = []
  for _ in range(30):
    pair = []
    for _ in range(2):
      left, top = rng.randint(0, 20), rng.randint(0, 20)
      pair.append(
        [left, top, left + rng.randint(1, 20), top + rng.randint(1, 20)]
      )
    rows.append([*pair, iou(*pair)])
  return {"iou": rows}


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--lmms", type=pathlib.Path, required=True)
  path = pathlib.Path(__file__).with_name("vlm_metrics.json")
  parser.add_argument("--to", type=pathlib.Path, default=path)
  args = parser.parse_args()
  rng = random.Random(0)
  found = {}
  for make in (normal_forms, vqa, documents, charts, yes_no, boxes):
    found |= make(args.lmms, rng)
  lines = (f"{json.dumps(name)}: {json.dumps(x)}" for name, x in found.items())
  args.to.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


if __name__ == "__main__":
  main()
