"""Transforms of one tower: adapters on the language model, a packed encoder.

Other systems' transforms see a tree of one model, whose layers are its runs.
`Within` gives them a tower's, so that each of them serves every tower.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from research.ranges import OneOf, Ranged
from research.typing import Params, PRNGKey, UserError
from research.vlm.model import TOWERS

Transform = Callable[[Params, PRNGKey], Params]
"""A pure rewrite of a parameter tree."""


@runtime_checkable
class _NeedsModel(Protocol):
  """A transform that gets the model first, to run data through it."""

  def with_model(self, loaded: Any) -> Transform: ...


@runtime_checkable
class _Rotates(Protocol):
  """A transform that may change the basis of the residual stream."""

  @property
  def rotates_residual(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Within(Ranged):
  """A transform of one tower's parameters; the others stay as they are.

  Attributes:
    tower: its name, one of `research.vlm.model.TOWERS`.
    transform: of its parameters, such as `Adapt` or `Quantize`. Addresses
      within it are the tower's own: `layers/0/attention/q`.
  """

  tower: OneOf(*TOWERS)
  transform: Transform

  def __post_init__(self):
    super().__post_init__()
    rotates = isinstance(self.transform, _Rotates)
    if rotates and self.transform.rotates_residual:
      raise UserError(
        f"Within.transform: found {type(self.transform).__name__} of a tower's"
        " residual stream, into which images come unrotated; expected"
        " Rotate(residual=False)"
      )

  def __call__(self, params: Params, key: PRNGKey) -> dict[str, Any]:
    """Returns the parameters of all towers, with those of one transformed.

    Raises:
      UserError: the parameters are not those of a model of towers.
    """
    if self.tower not in params:
      raise UserError(
        f"Within: found no tower {self.tower!r} in {', '.join(params)};"
        " expected the parameters of a vision language model"
      )
    return {**params, self.tower: self.transform(params[self.tower], key)}

  def with_model(self, loaded: Any) -> "Within":
    """Returns a copy whose transform runs its tower alone, if it runs any.

    Args:
      loaded: a vision language model; the transform gets one whose `model` and
        `params` are the tower's.
    """
    if not isinstance(self.transform, _NeedsModel):
      return self
    own = dataclasses.replace(
      loaded,
      model=getattr(loaded.model, self.tower),
      params=loaded.params[self.tower],
    )
    return dataclasses.replace(self, transform=self.transform.with_model(own))
