"""What rounding activations costs, matrix by matrix, and what repairs it.

For each matrix, an arm: how large outliers of its inputs are, before and after
a rotation by a random Hadamard matrix, and the median over tokens of the
outputs' relative error with activations of 8 and 4 bits, a scale a tensor or a
token, smoothed (SmoothQuant, alpha 0.5), or rotated (QuaRot).
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.core.experiment import Source
from experiments.studies import protocol
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.data.sources import Documents
from research.quant.reports import input_errors
from research.text import special_tokens
from research.typing import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationErrors(protocol.Study):
  """Matrices of a model, and the inputs that a text gives them.

  Attributes:
    model: whose matrices they are.
    text: documents, one after the other.
    matrices: their addresses.
    tokens: how many are read.
  """

  model: Source
  text: Documents
  matrices: Sequence[str]
  tokens: int = 256

  def __post_init__(self):
    protocol.distinct(list(self.matrices), "ActivationErrors.matrices")

  @property
  def arms(self) -> list[str]:
    """The matrices."""
    return list(self.matrices)

  def settings(self, arm: str) -> str:
    """Returns the model, the text and one matrix."""
    return f"{arm}, {protocol.describe(self, 'matrices')}"

  def prepare(self, workdir: pathlib.Path) -> dict[str, tuple[Any, Any]]:
    """Returns each matrix, after its inputs.

    Raises:
      UserError: the model has no tokenizer or no such matrix, or the text fewer
        than two tokens.
    """
    del workdir
    loaded = self.model.load()
    if loaded.tokenizer is None:
      raise UserError("ActivationErrors.model: found no tokenizer in it")
    text = "\n".join(self.text[i] for i in range(len(self.text)))
    first = special_tokens.from_tokenizer(loaded.tokenizer).row_begin
    ids = [*first, *loaded.tokenizer.encode(text)][: self.tokens]
    if len(ids) < 2:
      raise UserError(
        f"ActivationErrors: found {len(ids)} tokens, expected at least 2"
      )
    return input_errors.collect_inputs(
      loaded.model,
      loaded.params,
      jnp.asarray([ids], jnp.int32),
      tuple(self.matrices),
    )

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Returns the errors of a matrix' outputs, by `input_errors.COLUMNS`."""
    del before
    found = input_errors.errors(*shared[arm], jax.random.key(0))
    return {name: float(found[name]) for name in input_errors.COLUMNS}

  def table(self, rows: Rows) -> Lines:
    """Returns a line a matrix."""
    return [{"matrix": address, **row} for address, row in rows.items()]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what the three classic claims say of these matrices."""
    tensor, token, rotated, smooth = (
      {n: row[a] / (row[b] if b else 1) for n, row in rows.items()}
      for a, b in (
        ("A8 tensor", None),
        ("A8 token", None),
        ("A4 rotated", "A4 token"),
        ("A8 tensor smooth", "A8 tensor"),
      )
    )
    normed = [x for n, x in smooth.items() if not n.endswith("/down")]
    verdicts = [
      Verdict(
        "a scale a tensor loses most tokens somewhere, a scale a token none",
        f"largest error in 8 bits {max(tensor.values()):.3f}, a scale a token"
        f" {max(token.values()):.3f}",
        max(tensor.values()) > 0.5 and max(token.values()) < 0.1,
      ),
      Verdict(
        "a rotation divides the 4-bit error by 2.5 or more",
        f"by {1 / max(rotated.values()):.2f} at least",
        max(rotated.values()) <= 1 / 2.5,
      ),
    ]
    if normed:
      smoothed = Verdict(
        "SmoothQuant at least halves that error behind norms",
        f"{max(normed):.2f} of it is left at most (bar: 0.55)",
        max(normed) <= 0.55,
      )
      verdicts.insert(1, smoothed)
    return verdicts
