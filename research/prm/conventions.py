r"""How public reward models read a solution, and where they score its steps.

A convention turns a question and steps into token ids and, of each step, the
index at which its score is read: that of the newest token which the model has
read by then. Heads and checkpoints are `heads` and `interop.hf.rewards`; these
are the texts between.

Whatever a step says, it has one score. A text that contains a separator, such
as a tag that a policy wrote itself, is read as it is and adds no score, where
the published scripts, which look for ids, would find one more step.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from research.errors import UserError
from research.prm.formats import trl
from research.prm.formats.math_shepherd import TAG
from research.prm.labelled import LabelledSolution


class Encoded(NamedTuple):
  """A solution in tokens.

  Attributes:
    tokens: ids.
    ends: index of the token at which each step's score is read, its last one
      unless the convention says otherwise.
  """

  tokens: list[int]
  ends: list[int]


def step_tokens(tokenizer: Any, step: str, separator: str = "") -> list[int]:
  """Returns what a reward model of ours reads of a step, scored at the last.

  Rows of training, `judge` and every verifier of a search call it, so that a
  search scores a step where training labelled it. A step and the separator are
  encoded on their own, so that no token reaches over the seam.

  Args:
    tokenizer: the reward model's; has `encode(text)`.
    step: text, with whatever separates it from the next one in its solution,
      but without the token that ends a text.
    separator: text that the model reads after each step, in place of the
      separator or white space in which the step ends; "": the step as it is.

  Returns:
    Token ids; none of a step without text.
  """
  if not separator:
    return list(tokenizer.encode(step)) if step else []
  if not step.strip():
    return []
  words = step.rstrip().removesuffix(separator.rstrip()).rstrip()
  before = tokenizer.encode(words) if words else []
  return [*before, *tokenizer.encode(separator)]


@runtime_checkable
class Convention(Protocol):
  """What a reward model reads."""

  def encode(
    self, tokenizer: Any, question: str, steps: Sequence[str]
  ) -> Encoded:
    """Returns a solution's tokens, and where its steps are scored.

    Args:
      tokenizer: the reward model's `text.Tokenizer`.
      steps: texts of the solution's steps, at least one.

    Raises:
      UserError: the tokenizer is not of a model with this convention.
    """
    ...


@dataclasses.dataclass(frozen=True)
class MathShepherd:
  r"""`{question} Step 1: ... TAG\nStep 2: ... TAG`, scored at each tag.

  Wang et al. 2024; peiyi9979/math-shepherd-mistral-7b-prm, model card. The
  score is the softmax of the logits of "+" and "-": `GenerativeReward`, with
  Mistral's ids 648 and 387; the tag behind a space is 12902.

  Attributes:
    tag: after each step, behind a space.
    numbered: whether a step without "Step k: " gets it; the model has learned
      no others.
  """

  tag: str = TAG
  numbered: bool = True

  def encode(
    self, tokenizer: Any, question: str, steps: Sequence[str]
  ) -> Encoded:
    text, ends = f"{question} ", []
    for i, step in enumerate(steps, start=1):
      step, header = step.strip(), f"Step {i}:"
      if self.numbered and not step.startswith(header):
        step = f"{header} {step}".rstrip()
      text += ("\n" if ends else "") + f"{step} {self.tag}"
      ends.append(len(text))
    return _located(tokenizer.prompt, text, ends)


@dataclasses.dataclass(frozen=True)
class RLHFlow:
  """A chat: each step a user's turn, each answered by "+".

  Xiong et al. 2024; RLHFlow/RLHF-Reward-Modeling, math-rm/prm_evaluate.py. The
  score is the softmax of the logits of "+" and "-" at the token before each
  answer, which predicts it; earlier answers are "+", even those of bad steps.

  Attributes:
    joint: text between the question and the first step; ProcessBench's script
      has a blank line.
    answer: text of all answers.
  """

  joint: str = " "
  answer: str = "+"

  def encode(
    self, tokenizer: Any, question: str, steps: Sequence[str]
  ) -> Encoded:
    turns: list[dict[str, str]] = []
    before = []
    for i, step in enumerate(steps):
      content = step.strip() if i else f"{question}{self.joint}{step.strip()}"
      turns.append({"role": "user", "content": content})
      before.append(tokenizer.chat(turns))
      turns.append({"role": "assistant", "content": self.answer})
    text = tokenizer.chat(turns, add_generation_prompt=False)
    if not all(text.startswith(x + self.answer) for x in before):
      raise UserError(
        "RLHFlow: found a chat template whose earlier turns differ in longer"
        " chats, expected one such as Llama 3.1's"
      )
    return _located(tokenizer.encode, text, [len(x) for x in before])


@dataclasses.dataclass(frozen=True)
class Skywork:
  r"""`{bos}{question}\n{line}\n{line}\n`, scored at newlines.

  Skywork-o1-Open-PRM; SkyworkAI/skywork-o1-prm-inference, `prepare_input`. The
  score is the sigmoid of a value head (`v_head.summary`). Lines are encoded one
  by one, so that no token reaches over a newline. A step of several lines has
  the score of its last one, where the published script has one for each.
  """

  def encode(
    self, tokenizer: Any, question: str, steps: Sequence[str]
  ) -> Encoded:
    tokens = [*_bos(tokenizer), *tokenizer.encode(question + "\n")]
    newline, ends = tokenizer.encode("\n")[-1:], []
    for step in steps:
      for line in step.rstrip("\n").split("\n"):
        tokens += [*(tokenizer.encode(line) if line else ()), *newline]
      ends.append(len(tokens) - 1)
    return Encoded(tokens, ends)


@dataclasses.dataclass(frozen=True)
class QwenMathPRM:
  r"""A chat whose answer has a special token after each step, scored there.

  Zhang et al. 2025 (arXiv:2501.07301); Qwen2.5-Math-PRM-7B and -72B and
  Qwen2.5-Math-7B-PRM800K, model cards. The score is the softmax of two classes,
  of which the second one is right.

  Attributes:
    system: the system prompt.
    tag: the special token, in place of the blank line between steps.
  """

  system: str = (
    "Please reason step by step, and put your final answer within \\boxed{}."
  )
  tag: str = "<extra_0>"

  def encode(
    self, tokenizer: Any, question: str, steps: Sequence[str]
  ) -> Encoded:
    if len(tag_ids := tokenizer.encode(self.tag)) != 1:
      raise UserError(
        f"QwenMathPRM.tag: found {self.tag!r}, which is the tokens {tag_ids},"
        " expected a special token of the model"
      )
    parts = [step.strip("\n") + self.tag for step in steps]
    answer = "".join(parts)
    turns = [
      {"role": "system", "content": self.system},
      {"role": "user", "content": question},
      {"role": "assistant", "content": answer},
    ]
    text = tokenizer.chat(turns, add_generation_prompt=False)
    at = text.rfind(answer)
    if at < 0:
      raise UserError(
        "QwenMathPRM: found a chat template that changes an answer, expected"
        " one such as Qwen2.5's"
      )
    ends = []
    for part in parts:
      at += len(part)
      ends.append(at)
    return _located(tokenizer.encode, text, ends)


@dataclasses.dataclass(frozen=True)
class TRL:
  r"""`{bos}{question}{step}{separator}...`, scored at the last separator token.

  huggingface/trl, `PRMTrainer.tokenize_row`: token classification with two
  labels, of which the second one is right. All parts are encoded one by one.

  Attributes:
    separator: after each step; TRL's default. Recipes use a blank line, too.
  """

  separator: str = "\n"

  def encode(
    self, tokenizer: Any, question: str, steps: Sequence[str]
  ) -> Encoded:
    solution = LabelledSolution(
      prompt=question,
      steps=tuple(x.removesuffix(self.separator) for x in steps),
      labels=(1,) * len(steps),
    )
    bos = next(iter(_bos(tokenizer)), None)
    encode = tokenizer.encode
    tokens, labels = trl.tokenize(solution, encode, self.separator, bos)
    ends = [i for i, label in enumerate(labels) if label != trl.IGNORED]
    return Encoded(tokens, ends)


CONVENTIONS = {
  "math_shepherd": MathShepherd(),
  "rlhflow": RLHFlow(),
  "skywork": Skywork(),
  "qwen_math_prm": QwenMathPRM(),
  "trl": TRL(),
}
"""By name, as published."""


def _bos(tokenizer: Any) -> list[int]:
  """Returns the id that begins a text, whether or not `prompt` adds it."""
  bos = getattr(tokenizer, "bos", None)
  return [] if bos is None else [bos]


def _located(
  encode: Callable[[str], list[int]], text: str, ends: Sequence[int]
) -> Encoded:
  """Returns a text's tokens, and the last one of each of its beginnings.

  Ids alone do not say which tags are those of steps: a step may contain one.

  Args:
    encode: text -> ids.
    text: read whole, as the published scripts do.
    ends: characters of the beginnings.

  Raises:
    UserError: a token reaches over an end.
  """
  tokens, last_tokens = list(encode(text)), []
  for end in ends:
    before = list(encode(text[:end]))
    if not before or tokens[: len(before)] != before:
      raise UserError(
        "convention: found a token that reaches over the end of"
        f" {text[:end][-20:]!r} into {text[end : end + 10]!r}, expected a"
        " tokenizer that separates them, as the reward model's own"
      )
    last_tokens.append(len(before) - 1)
  return Encoded(tokens, last_tokens)
