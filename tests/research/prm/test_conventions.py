"""What public reward models read, against the ids of their own scripts."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from research.interop import rewards
from research.interop.loaded import Loaded
from research.prm import conventions, formats, rows
from research.prm.conventions import CONVENTIONS
from research.prm.formats.math_shepherd import TAG
from research.prm.labelled import LabelledSolution
from research.text.tokenizer import Tokenizer
from research.typing import UserError
from tests import support

FOLDER = pathlib.Path(__file__).parents[2] / "golden" / "conventions"
GOLDEN = json.loads((FOLDER / "golden.json").read_text("utf-8"))
TOKENIZERS = {
  name: Tokenizer.from_directory(FOLDER / name)
  for name in ("mistral", "llama", "qwen")
}
STEPS = ["16 - 3 = 13", "The answer is: 18"]


@pytest.mark.parametrize(
  "case", GOLDEN, ids=lambda x: f"{x['convention']}-{x['tokenizer']}"
)
def test_ids_and_places_are_those_of_the_published_script(case):
  convention = CONVENTIONS[case["convention"]]
  tokenizer = TOKENIZERS[case["tokenizer"]]
  found = convention.encode(tokenizer, case["question"], case["steps"])
  assert found.tokens == case["tokens"]
  want = case["ends"]
  if case["convention"] == "skywork":
    # A step of several lines has one score, that of its last line.
    lines = np.cumsum([x.count("\n") + 1 for x in case["steps"]])
    want = [want[i - 1] for i in lines]
  assert found.ends == want
  # Steps that keep the separator behind them are the same steps.
  own = [x + "\n" for x in case["steps"]]
  assert convention.encode(tokenizer, case["question"], own) == found


def test_golden_strings():
  """Stated from the model cards, beside what the scripts gave."""
  texts = {x["convention"]: x["text"] for x in GOLDEN}
  assert (
    f"? Step 1: Janet's ducks lay 16 eggs per day. {TAG}\nStep 2: She"
    in (texts["math_shepherd"])
  )
  assert texts["math_shepherd"].endswith(f"The answer is: 18 {TAG}")
  assert texts["qwen_math_prm"].startswith(
    "<|im_start|>system\nPlease reason step by step, and put your final answer"
    " within \\boxed{}.<|im_end|>\n<|im_start|>user\nJanet"
  )
  assert "per day.<extra_0>Step 2: She" in texts["qwen_math_prm"]
  assert texts["qwen_math_prm"].endswith("is: 18<extra_0><|im_end|>\n")
  turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
  assert texts["rlhflow"].endswith(
    turn.format("user", "Step 4: The answer is: 18")
    + turn.format("assistant", "+")
  )
  assert "market? Step 1: Janet" in texts["rlhflow"]


def test_ids_of_trl_are_those_of_its_docstring():
  """`PRMTrainer.tokenize_row`, Qwen2.5's tokenizer: labels 1 and 0 there."""
  found = conventions.TRL().encode(
    TOKENIZERS["qwen"],
    "Which number is larger, 9.8 or 9.11?",
    ["11 is greater than 8.", "Hence, 9.11 > 9.8."],
  )
  prompt = [23085, 1372, 374, 8131, 11, 220, 24, 13, 23, 476, 220, 24, 13]
  prompt += [16, 16, 30]
  first = [16, 16, 374, 7046, 1091, 220, 23, 13, 198]
  second = [39, 763, 11, 220, 24, 13, 16, 16, 861, 220, 24, 13, 23, 13, 198]
  assert found.tokens == [*prompt, *first, *second]
  assert found.ends == [len(prompt) + 8, len(found.tokens) - 1]


@pytest.mark.parametrize(
  ("tokenizer", "right", "wrong"), [("mistral", 648, 387), ("llama", 10, 12)]
)
def test_words_of_judges_are_the_published_ids(tokenizer, right, wrong):
  """Mistral's of "+ -" in Math-Shepherd's card, Llama 3's of "+" and "-"."""
  backbone = support.model(depth=1, width=8, hidden=8, head_dim=4, vocab=700)

  @dataclasses.dataclass(frozen=True)
  class Given:
    def load(self, shardings=None):
      return Loaded(backbone, {}, TOKENIZERS[tokenizer], {})

  model = rewards.WithWords(backbone=Given()).load().model
  assert (model.right, model.wrong) == (right, wrong)
  with pytest.raises(UserError, match=r"WithWords.wrong: found 'is wrong'"):
    rewards.WithWords(backbone=Given(), wrong="is wrong").load()


@pytest.mark.parametrize(
  ("name", "tokenizer", "inside", "id"),
  [
    ("math_shepherd", "mistral", f"it {TAG} is", 12902),
    ("qwen_math_prm", "qwen", "it <extra_0> is", 151651),
    ("skywork", "qwen", "it\nis", 198),
    ("trl", "qwen", "it\nis", 198),
    ("rlhflow", "llama", "it + is", 271),
  ],
)
def test_a_step_that_contains_the_separator_has_one_score(
  name, tokenizer, inside, id
):
  words = TOKENIZERS[tokenizer]
  plain = CONVENTIONS[name].encode(words, "2 + 2?", STEPS)
  found = CONVENTIONS[name].encode(words, "2 + 2?", [inside, *STEPS])
  assert len(found.ends) == 3
  assert [found.tokens[i] for i in found.ends] == [id] * 3
  # All that follows the first step is read as without it, whatever it says.
  rest = plain.tokens[plain.ends[0] + 1 :]
  if name != "math_shepherd":  # whose steps are numbered
    assert found.tokens[found.ends[1] + 1 :] == rest
  assert plain.ends[1] - plain.ends[0] == found.ends[2] - found.ends[1]


def test_steps_of_math_shepherd_are_numbered():
  words, convention = TOKENIZERS["mistral"], CONVENTIONS["math_shepherd"]
  numbered = [f"Step {i}: {x}" for i, x in enumerate(STEPS, start=1)]
  found = convention.encode(words, "2 + 2?", numbered)
  assert convention.encode(words, "2 + 2?", STEPS) == found
  as_they_are = conventions.MathShepherd(numbered=False)
  assert as_they_are.encode(words, "2 + 2?", STEPS) != found


class Merging:
  """One id a character, but for a tag and what follows it."""

  chat_template = "{question}"

  def encode(self, text):
    return list(map(ord, text.replace(f"{TAG}\n", "\n")))

  prompt = encode

  def chat(self, turns, add_generation_prompt=True):
    del add_generation_prompt
    return " ".join(x["content"] for x in turns[-2:])


def test_a_tokenizer_of_another_model_is_an_error():
  with pytest.raises(UserError, match="token that reaches over the end"):
    CONVENTIONS["math_shepherd"].encode(Merging(), "q", STEPS)
  with pytest.raises(UserError, match="earlier turns differ"):
    CONVENTIONS["rlhflow"].encode(Merging(), "q", STEPS)
  with pytest.raises(UserError, match="expected a special token"):
    CONVENTIONS["qwen_math_prm"].encode(TOKENIZERS["llama"], "q", STEPS)
  with pytest.raises(UserError, match="has no chat template"):
    CONVENTIONS["rlhflow"].encode(TOKENIZERS["mistral"], "q", STEPS)


def test_rows_have_labels_where_the_convention_scores(tmp_path):
  solution = LabelledSolution(
    prompt="2 + 2?", steps=tuple(STEPS), labels=(1, 0)
  )
  path = str(tmp_path / "labels.jsonl")
  formats.write(path, [solution], formats.FORMATS["native"])
  convention, words = CONVENTIONS["rlhflow"], TOKENIZERS["llama"]
  data = rows.LabelledRows(paths=path, length=128, convention=convention)
  want = convention.encode(words, "2 + 2?", STEPS)
  (row,) = [data.rows(words)[0]]
  assert np.flatnonzero(row["weights"]).tolist() == want.ends
  assert row["tokens"][: len(want.tokens)].tolist() == want.tokens
  # The answers that are filled in say "+" of the wrong step, too.
  assert [row["tokens"][i + 1] for i in want.ends] == [10, 10]
  with pytest.raises(
    UserError, match=r"LabelledRows.convention: found RLHFlow"
  ):
    dataclasses.replace(data, separator="\n")
