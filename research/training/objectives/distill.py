"""Knowledge distillation (Hinton et al. 2015, arXiv:1503.02531)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.masks import Mask
from research import weights
from research.nn.transformer import Transformer
from research.ranges import PositiveFloat, Ranged, Share
from research.training import positions
from research.training.objectives import losses
from research.training.objectives.objective import Batch, Sums
from research.training.objectives.preference import Part, Select
from research.typing import Array, Float, Params, PRNGKey, UserError


@dataclasses.dataclass(frozen=True)
class Distill(Ranged):
  """Distillation loss: forward KL from the teacher, mixed with cross-entropy.

    (1 - h) t^2 KL(teacher^(1/t) || student^(1/t)) + h (-log student(target))

  where p^(1/t) is the softmax of logits / t. The factor t^2 keeps gradients
  comparable between temperatures (section 2 of the paper).

  Attributes:
    model: the student's network; the experiment sets it.
    teacher: the teacher's network; None if it is the same (a model before
      quantization, or with its adapters).
    temperature: t.
    hard_weight: h, the weight of the cross-entropy on the targets.
    student: selects the parameters of the student.
    source: selects the parameters of the teacher, which get no gradient.
    rows: rows of logits of each model materialised at a time.
  """

  model: Transformer | None = None
  teacher: Transformer | None = None
  temperature: PositiveFloat = 1.0
  hard_weight: Share = 0.0
  student: Select = Part("student")
  source: Select = Part("teacher")
  rows: int = 256

  def __call__(self, params: Params, batch: Batch, key: PRNGKey | None) -> Sums:
    """Returns the sums of loss, weights and metrics.

    The metrics are `divergence` (without t^2), the student's `cross_entropy`
    and `accuracy` on the targets, and `agreement`: whether both models have the
    same most likely token.
    """
    student = weights.bind(self.student(params), key=key)
    source = jax.lax.stop_gradient(self.source(params))
    student, source = (
      weights.with_tokens(p, batch["tokens"], batch["segments"])
      for p in (student, source)
    )
    teacher = self.teacher or self.model
    if teacher.vocab_size != self.model.vocab_size:
      raise UserError(
        f"Distill: found a teacher of {teacher.vocab_size} tokens and a student"
        f" of {self.model.vocab_size}, expected the same vocabulary."
      )
    mask = Mask.causal(segments=batch["segments"])
    hiddens = [
      model.apply({"params": p}, batch["tokens"], batch["positions"], mask)[0]
      for model, p in ((self.model, student), (teacher, source))
    ]
    metrics = positions.map_positions(
      self._of_chunk,
      (positions.head_of(student), positions.head_of(source)),
      *hiddens,
      batch["targets"],
      rows=self.rows,
    )
    sums = {k: (v * batch["weights"]).sum() for k, v in metrics.items()}
    soft = self.temperature**2 * sums["divergence"]
    loss_sum = (1 - self.hard_weight) * soft + self.hard_weight * sums[
      "cross_entropy"
    ]
    return loss_sum, batch["weights"].sum(), sums

  def _of_chunk(
    self, heads: Any, student: Any, teacher: Any, targets: Any
  ) -> dict[str, Float[Array, "B T"]]:
    ours = positions.fp32_logits(self.model, heads[0], student)
    theirs = positions.fp32_logits(
      self.teacher or self.model, heads[1], teacher
    )
    cross_entropy, accuracy = losses.token_losses(ours, targets)
    agreement = ours.argmax(-1) == theirs.argmax(-1)
    log_p = jax.nn.log_softmax(theirs / self.temperature)
    log_q = jax.nn.log_softmax(ours / self.temperature)
    return {
      "divergence": (jnp.exp(log_p) * (log_p - log_q)).sum(-1),
      "cross_entropy": cross_entropy,
      "accuracy": accuracy,
      "agreement": agreement.astype(jnp.float32),
    }
