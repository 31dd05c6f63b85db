r"""Makes `step_labels/`: a file in each published layout of step labels.

The content is made up; the layouts are those of

* PRM800K: github.com/openai/prm800k, README (the record of phase 2; phase 1 has
  null `generation`, no `pre_generated_*`, and human completions);
* Math-Shepherd: huggingface.co/datasets/peiyi9979/Math-Shepherd, dataset card;
* TRL: huggingface.co/docs/trl, dataset formats, stepwise supervision;
* RLHFlow: github.com/RLHFlow/RLHF-Reward-Modeling, math-rm/README;
* MATH-APS: github.com/openreasoner/openr, data/omegaPRM_v2 (`collect_*` of
  omegaprm.py, `process_question` of run_omegaprm.py), its docs (Datasets) and
  prm/code/test.json;
* ProcessBench: github.com/QwenLM/ProcessBench, README;
* PRMBench: github.com/ssmisya/PRMBench, docs, "Data Format";
* GenPRM: huggingface.co/datasets/GenPRM/GenPRM-MATH-Data, dataset card;
* ThinkPRM: huggingface.co/datasets/launch/thinkprm-1K-verification-cots, card.

`note` fields are none of theirs: unknown fields have to survive.

    python -m tests.golden.make_step_labels
"""

import json
import pathlib

FOLDER = pathlib.Path(__file__).parent / "step_labels"
TAG, NEWLINES = "ки", "\n" * 5
QUESTION = "Ann has 3 bags of 4 figs and eats 2. How many are left?"
STEPS = ["There are 3 x 4 = 12 figs.", "12 - 2 = 9.", "The answer is 9."]


def _completion(text, rating, flagged=None):
  return {"text": text, "rating": rating, "flagged": flagged}


def _prm800k():
  phase1 = {
    "labeler": "made-up-1",
    "timestamp": "2022-07-17T16:56:51.323252",
    "generation": None,
    "is_quality_control_question": False,
    "is_initial_screening_question": False,
    "question": {"problem": QUESTION, "ground_truth_answer": "10"},
    "label": {
      "steps": [
        {
          "completions": [
            _completion(STEPS[0], 1),
            _completion("Figs are sweet.", 0, False),
          ],
          "human_completion": None,
          "chosen_completion": 0,
        },
        {
          "completions": [_completion("12 - 2 = 9.", -1)],
          "human_completion": {
            "text": "12 - 2 = 10.",
            "rating": None,
            "source": "human",
            "flagged": False,
            "corrected_rating": None,
          },
          "chosen_completion": None,
        },
        {
          "completions": [_completion("# Answer\n\n10", 1)],
          "human_completion": None,
          "chosen_completion": 0,
        },
      ],
      "total_time": 278270,
      "finish_reason": "solution",
    },
  }
  phase2 = json.loads(json.dumps(phase1))
  phase2 |= {"generation": 9, "labeler": "made-up-2", "note": {"x": [1, None]}}
  phase2["question"] |= {
    "ground_truth_solution": "12 - 2 = 10.",
    "pre_generated_steps": STEPS,
    "pre_generated_answer": "9",
    "pre_generated_verifier_score": 0.010779580529581414,
  }
  phase2["label"]["steps"] = [
    {
      "completions": [_completion(STEPS[0], 1)],
      "human_completion": None,
      "chosen_completion": 0,
    },
    {
      "completions": [
        _completion("12 - 2 = 9.", -1),
        _completion("12 - 2 = 10.", 1, False),
        _completion("I subtract.", None, False),
      ],
      "human_completion": None,
      "chosen_completion": None,
    },
  ]
  phase2["label"]["finish_reason"] = "found_error"
  control = json.loads(json.dumps(phase2))
  control["is_quality_control_question"] = True
  return [phase1, phase2, control]


def _math_shepherd():
  numbered = [f"Step {i}: {x}" for i, x in enumerate(STEPS, start=1)]
  rows = []
  for task, signs in (("GSM8K", "+--"), ("MATH", "+++")):
    tagged = [f"{x} {TAG}" for x in numbered]
    signed = [f"{x} {s}" for x, s in zip(numbered, signs, strict=True)]
    texts = [f"{QUESTION} " + "\n".join(x) for x in (tagged, signed)]
    rows.append({"input": texts[0], "label": texts[1], "task": task})
  return rows


def _trl():
  hard = {"prompt": QUESTION, "completions": STEPS}
  return [
    hard | {"labels": [True, False, False], "note": "hard"},
    hard | {"labels": [1.0, 0.25, 0.0], "note": "soft"},
  ]


def _rlhflow():
  turns = [f"{QUESTION} {STEPS[0]}", *STEPS[1:]]
  chat = []
  for turn, sign in zip(turns, "+--", strict=True):
    chat.append({"role": "user", "content": turn})
    chat.append({"role": "assistant", "content": sign})
  return [{"conversations": chat, "note": 1}]


def _math_aps():
  prefixes = [QUESTION]
  for step in STEPS:
    prefixes.append(f"{prefixes[-1]}\n\n{step}")
  other = f"{prefixes[1]}\n\n12 - 2 = 10.\n\nSo 10."
  values = [0.5, 0.75, 0.0, 0.0]
  flat = [
    {"solution_prefix": x, "mc_value": v}
    for x, v in zip(prefixes, values, strict=True)
  ]
  flat.append({"solution_prefix": other, "mc_value": 1.0})
  head = {"question": QUESTION, "final_answer": "10"}
  wrong = {"text": "\n\n".join(STEPS[1:]), "mc_value": 0.0, "children": []}
  right = {"text": "12 - 2 = 10.\n\nSo 10.", "mc_value": 1.0, "children": []}
  first = {"text": STEPS[0], "mc_value": 0.75, "children": [wrong, right]}
  root = {"text": QUESTION, "mc_value": 0.5, "children": [first]}
  tagged = "\n".join(f"{x} {NEWLINES}" for x in STEPS)
  process = {"question": QUESTION, "process": tagged}
  return {
    "math_aps_flat": [head | {"reasoning_steps": flat}],
    "math_aps_tree": [head | {"reasoning_steps": root}],
    "math_aps_process": [
      process | {"label": ["+", "-", "-"], "note": "signs"},
      process | {"label": [1, 0, 0], "note": "numbers"},
    ],
  }


def _processbench():
  row = {
    "id": "gsm8k-0",
    "generator": "Made-Up-7B",
    "problem": QUESTION,
    "steps": STEPS,
    "final_answer_correct": False,
    "label": 1,
  }
  right = {"id": "gsm8k-1", "final_answer_correct": True, "label": -1}
  return [row, row | right | {"note": []}]


def _prmbench():
  row = {
    "original_question": QUESTION,
    "modified_question": QUESTION,
    "original_process": [f"1. {STEPS[0]}", "2. 12 - 2 = 10."],
    "modified_process": [f"{i}. {x}" for i, x in enumerate(STEPS, start=1)],
    "modified_steps": [2, 3],
    "error_steps": [2, 3],
    "reason": "Step 2 subtracts wrongly, and step 3 goes on from there.",
    "idx": "confidence_made_up_0",
    "question": QUESTION,
    "classification": "confidence",
  }
  more = {"idx": "redundency_made_up_0", "classification": "redundency"}
  return [row, row | more | {"error_steps": [3]}]


def _genprm():
  system = (
    "You are a math teacher. Your task is to review and critique the paragraphs"
    " in solution step by step."
  )
  chat = [{"role": "system", "content": system}]
  users = [f"Question: {QUESTION}\n\n{STEPS[0]}", *STEPS[1:]]
  for user, answer in zip(users, ("Yes", "No", "No"), strict=True):
    critique = (
      "<analyze>\nI compute it again.\n</analyze>\n<verify>\n```python\n"
      "print(3 * 4 - 2)\n```\n[Code Output]\n\n```\n10\n```\n</verify>\n"
      f"<output>\n**Judgement**: $\\boxed{{{answer}}}$\n</output>"
    )
    chat.append({"role": "user", "content": user})
    chat.append({"role": "assistant", "content": critique})
  return [{"conversations": chat, "note": None}]


def _thinkprm():
  cot = (
    "Step 1: 3 x 4 = 12. This step is \\boxed{correct}\n\n"
    "Step 2: 12 - 2 is 10, not 9. This step is \\boxed{incorrect}"
  )
  return [
    {
      "problem": QUESTION,
      "prefix": "\n".join(STEPS),
      "cot": cot,
      "prefix_steps": STEPS,
      "gt_step_labels": ["+", "-", "-"],
      "prefix_label": False,
    }
  ]


def _native():
  return [
    {
      "problem_id": "figs",
      "prompt": QUESTION,
      "label_source": "monte_carlo_hard",
      "policy_id": "made-up",
      "segmenter_id": "line",
      "steps": STEPS,
      "step_labels": [1, 0, None],
      "step_mc": [{"c": 5, "k": 8}, {"c": 0, "k": 8}, None],
      "first_error": 1,
      "final_correct": False,
      "critiques": [],
      "note": {"deep": [{"er": 1}]},
    }
  ]


def main() -> None:
  """Writes the files."""
  made = {
    "prm800k": _prm800k(),
    "math_shepherd": _math_shepherd(),
    "trl": _trl(),
    "rlhflow": _rlhflow(),
    **_math_aps(),
    "processbench": _processbench(),
    "prmbench": _prmbench(),
    "genprm": _genprm(),
    "thinkprm": _thinkprm(),
    "native": _native(),
  }
  FOLDER.mkdir(exist_ok=True)
  for name, rows in made.items():
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (FOLDER / f"{name}.jsonl").write_text("".join(lines), "utf-8")


if __name__ == "__main__":
  main()
