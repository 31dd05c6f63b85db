"""A transform that trains through rounding: masters, scales or adapters.

It stands where other methods round once, so its result is a row among theirs
(`experiments.studies.quant.quant_study`).
"""

import dataclasses
from typing import Any

import jax

from experiments.core import cli
from research.data.pipeline import Data
from research.lora import adapt
from research.lora.method import Method
from research.optim import optim
from research.quant.algorithms import qat
from research.quant.format import Format
from research.training import state, step
from research.training.objectives import distill
from research.training.objectives.objective import NextToken
from research.training.objectives.preference import Part
from research.typing import Params, PRNGKey, UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
  """Prepares the layers' matrices, trains, and packs what came out.

  Norms are trained with the matrices; with an adapter it alone is.

  Attributes:
    format: what the matrices are packed in.
    data: what is read.
    steps: updates.
    rate: Adam's highest; a short warm-up, then half a cosine to a tenth.
    learned: whether scales are learned, see `qat.Prepare`.
    adapter: what is trained in the masters' place, or None.
    distilled: whether the target is the model before, or the text.
    model, tokenizer: set by `with_model`.
  """

  format: Format
  data: Data
  steps: int = 100
  rate: float = 3e-4
  learned: bool = False
  adapter: Method | None = None
  distilled: bool = True
  model: Any = None
  tokenizer: Any = None

  def with_model(self, loaded: Any) -> "Trained":
    """Returns itself for a model and its tokenizer."""
    return dataclasses.replace(
      self, model=loaded.model, tokenizer=loaded.tokenizer
    )

  def __call__(self, params: Params, key: PRNGKey) -> Any:
    """Returns `params` packed, after training.

    Raises:
      UserError: no model yet, or a loss that is not finite.
    """
    if self.model is None:
      raise UserError("Trained: has no model; `with_model` sets it")
    student = params
    if self.adapter is not None:
      student = adapt.Adapt(method=self.adapter)(params, key)
    prepare = qat.Prepare(format=self.format, learned=self.learned)
    both = {"student": prepare(student), "teacher": params}
    return qat.Convert()(self._fit(both, key)["student"])

  def _fit(self, both: Params, key: PRNGKey) -> Any:
    rate = optim.cosine(self.rate, self.steps, min(10, self.steps // 4))
    tx = optim.adamw(rate)
    trainable = r"^student/run(?!.*/start$)"
    if self.adapter is not None:
      trainable = r"^student/.*/trained/"
    now = state.create(both, trainable, tx)
    update = jax.jit(step.make_train_step(self._objective(), tx))
    batches = iter(self.data.training(self.tokenizer))
    losses = []
    for _ in range(self.steps):
      now, metrics = update(now, next(batches), key)
      losses.append(metrics["loss"])
    tail = losses[-10:]
    first, last = float(losses[0]), float(sum(tail) / len(tail))
    cli.say(f"  {self.steps} steps: loss {first:.4f}, at the end {last:.4f}")
    if not last < float("inf"):
      raise UserError(f"Trained: the loss became {last}; expected a lower rate")
    return now.params

  def _objective(self) -> Any:
    if self.distilled:
      return distill.Distill(self.model)
    return _Student(NextToken(self.model))


@dataclasses.dataclass(frozen=True)
class _Student:
  """An objective of the student alone."""

  objective: NextToken

  def __call__(self, params: Params, batch: Any, key: PRNGKey | None) -> Any:
    return self.objective(Part("student")(params), batch, key)
