"""The root of every configuration: an experiment as one frozen value.

It holds everything that a run depends on. A gin file describes one
(`experiments.core.config`), or Python code builds it; both are equal.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Protocol, runtime_checkable

import jax
import optax

from experiments.core.device_context import DeviceContext
from research.data.packing import Row
from research.data.pipeline import Data
from research.data.sources import NoExamples
from research.interop import load
from research.interop.loaded import Loaded, Source, load_abstract
from research.io import folders, unread
from research.io.unread import Shardings
from research.nn.layers import Remat
from research.ranges import PositiveInt, Ranged
from research.sharding import Layout
from research.training import state
from research.training.aot import StateTransform
from research.training.loop import TrainConfig
from research.training.objectives.objective import (
  Batch,
  Objective,
  with_model,
)
from research.training.rollouts import Rollouts
from research.typing import Params, PRNGKey

SINGLE_DEVICE = DeviceContext()
"""One device."""

Transform = Callable[[Params, PRNGKey], Params]
"""A pure rewrite of a parameter tree: quantize, adapt, merge."""


@runtime_checkable
class NeedsModel(Protocol):
  """A transform that runs data through the model, which it gets first."""

  def with_model(self, loaded: Loaded) -> Transform: ...


@runtime_checkable
class RolloutData(Protocol):
  """Data that the policy samples itself, see `training.rollouts`."""

  def with_objective(self, objective: Any) -> Rollouts:
    """Returns the rollouts of an objective that has its model."""
    ...


@runtime_checkable
class AnswerReport(Protocol):
  """What a model's answers are worth: a table as text, and as plain values."""

  def __str__(self) -> str: ...

  def to_json(self) -> dict[str, Any]: ...


@runtime_checkable
class Answers(Protocol):
  """Asks a model questions, and reports on its answers."""

  def __call__(self, loaded: Loaded) -> AnswerReport: ...


@runtime_checkable
class NeedsEncoder(Protocol):
  """Data that may have features of the model's frozen encoder."""

  def with_encoder(
    self, model: Any, params: Params, trainable: str
  ) -> Data: ...


@runtime_checkable
class NormalisesPixels(Protocol):
  """An objective that normalises pixels itself."""

  def check_preprocessor(self, preprocessor: Any) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
  """A model that exists.

  Attributes:
    name: whatever `--model=` takes, see `research.interop.load`.
    dtype: of computation and of the base weights.
    packed: whether quantized weights stay as the file has them; None: those
      of Hugging Face directories.
    remat: what the backward pass recomputes.
    towers: of a vision language model: "language", or "all" of them.
    image_size: another size of its images, an `interop.vision.ImageSize`.
  """

  name: str
  dtype: str = "float32"
  packed: bool | None = None
  remat: Remat = "names"
  towers: load.Towers = "language"
  image_size: Callable[[Loaded], Loaded] | None = None

  def load(self, shardings: Shardings | None = None) -> Loaded:
    """Returns the model, its weights and its tokenizer."""
    loaded = load.load_model(
      self.name,
      self.dtype,
      self.packed,
      shardings,
      self.towers,
      self.image_size,
    )
    return dataclasses.replace(
      loaded, model=loaded.model.clone(remat=self.remat)
    )

  def load_abstract(self) -> Loaded:
    """Returns the same with shapes in place of weights, which are not read."""
    return self.load(unread.unplaced)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Ranged):
  """A training run.

  Attributes:
    model: where the model and its first weights come from.
    transforms: of the weights, in order, before training.
    trainable: regular expression of the paths that are learned.
    transformed: regular expression of further paths, which only
      `state_transforms` change and which checkpoints keep, or None.
    objective: the loss; the loaded model is put into its field `model`.
    optimizer: an optax chain over the trainable part.
    data: what is trained on: rows, or rollouts of the policy.
    plan: how long to train, and when to evaluate and save.
    validation: what the best checkpoint is chosen by, or None.
    heldout: what the result is measured on, before and after, or None.
    eval_batches: at most so many batches of each of those two; None for all.
    answers: evaluation questions for the trained model, whose report is in the
      result beside the loss; None for nothing.
    step_report: judges labelled steps by the trained reward model; its main
      numbers are the result's own. None for nothing.
    state_transforms: of the training state, after each step, in order.
    after: transforms of the trained weights, in order; the result is saved as
      our checkpoint, which keeps every kind of weight.
    mesh: the mesh of devices, and what is cut along its axes; one device by
      default.
    seed: of the transforms' random numbers.
    prompt: text that the model continues before and after training, or None.
    continuation: tokens of that continuation.
  """

  model: Source
  optimizer: optax.GradientTransformation
  objective: Objective
  data: Data | RolloutData
  plan: TrainConfig
  transforms: tuple[Transform, ...] = ()
  trainable: str = "."
  transformed: str | None = None
  validation: Data | None = None
  heldout: Data | None = None
  eval_batches: PositiveInt | None = None
  answers: Answers | None = None
  step_report: Answers | None = None
  state_transforms: tuple[StateTransform, ...] = ()
  after: tuple[Transform, ...] = ()
  mesh: Layout = Layout(data=1)
  seed: int = 0
  prompt: str | None = None
  continuation: int = 48

  def build(self, context: DeviceContext = SINGLE_DEVICE) -> "BuiltExperiment":
    """Returns the model with transformed and sharded weights, and its loss.

    Args:
      context: the devices; each process reads the parts of its own.
    """
    loaded = self.model.load(context.placement)
    params = loaded.params
    key = jax.random.key(self.seed)
    for i, transform in enumerate(self.transforms_of(loaded)):
      params = transform(params, jax.random.fold_in(key, i))
    if context.mesh is not None:
      context = context.for_model(loaded.model)
      params = state.shard_params(params, context.shardings)
    objective = with_model(self.objective, loaded.model)
    pixels = isinstance(objective, NormalisesPixels)
    if pixels and loaded.preprocessor is not None:
      objective.check_preprocessor(loaded.preprocessor)
    return BuiltExperiment(
      loaded=loaded, params=params, objective=objective, context=context
    )

  def load_abstract(self) -> Loaded:
    """Returns the model with shapes in place of transformed weights.

    Nothing is read or computed.
    """
    loaded = load_abstract(self.model)
    key, params = jax.eval_shape(jax.random.key, self.seed), loaded.params
    for transform in self.transforms_of(loaded):
      params = jax.eval_shape(transform, params, key)
    return dataclasses.replace(loaded, params=params)

  def transforms_of(self, loaded: Loaded) -> list[Transform]:
    """Returns the transforms, with the model for those that need it."""
    return [
      t.with_model(loaded) if isinstance(t, NeedsModel) else t
      for t in self.transforms
    ]

  def with_encoder_of(self, built: "BuiltExperiment") -> "Experiment":
    """Returns the experiment whose data have the built model's encoder."""

    def one(data: Any) -> Any:
      if not isinstance(data, NeedsEncoder):
        return data
      return data.with_encoder(built.loaded.model, built.params, self.trainable)

    return dataclasses.replace(
      self,
      data=one(self.data),
      validation=one(self.validation),
      heldout=one(self.heldout),
    )

  def training(
    self, built: "BuiltExperiment", tokenizer: Any
  ) -> Iterable[Batch] | Rollouts:
    if isinstance(self.data, RolloutData):
      return self.data.with_objective(built.objective)
    return self.data.training(tokenizer, *built.context.share)

  def finished(self, params: Params) -> Params:
    """Returns trained weights after the transforms of `after`."""
    key = jax.random.key(self.seed)
    for i, transform in enumerate(self.after):
      params = transform(params, jax.random.fold_in(key, i))
    return params

  def evaluations(self, tokenizer: Any) -> dict[str, list[Row]]:
    """Returns the batches of `validation` and `heldout`, if there are any.

    Few data may leave one of them without examples, which is warned of.
    """
    parts = {"validation": self.validation, "heldout": self.heldout}
    found = {}
    for name, data in parts.items():
      if data is None:
        continue
      try:
        batches = data.evaluation(tokenizer, self.eval_batches)
        if not batches:
          raise NoExamples("no sample is in the split")
        found[name] = batches
      except NoExamples as error:
        why = str(error).split("\n")[0]
        folders.warn(
          f"there is no {name} data ({why}); the run continues without"
        )
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuiltExperiment:
  """An experiment's model and loss, ready to be trained or evaluated.

  Attributes:
    loaded: the model as it was imported.
    params: its weights after the transforms.
  """

  loaded: Loaded
  params: Any
  objective: Any
  context: DeviceContext = SINGLE_DEVICE

  def with_tokenizer(self, tokenizer: Any) -> "BuiltExperiment":
    loaded = dataclasses.replace(self.loaded, tokenizer=tokenizer)
    return dataclasses.replace(self, loaded=loaded)
