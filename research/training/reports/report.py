"""Reports step metrics: metric writers, progress bar, non-finite check."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from research.io.folders import Folder
from research.training.reports import metrics as reports
from research.training.reports.goodput import Goodput
from research.typing import UserError


class Report:
  """Writes the metrics of each step; a context manager.

  Every process reads the metrics and stops if one is not finite. Only the first
  process writes.
  """

  def __init__(
    self,
    workdir: Folder,
    writers: Sequence[reports.WriterFactory],
    resumed: int | None,
    steps: int,
    clock: Goodput,
    good: Callable[[], int | None],
  ):
    """Opens the writers.

    Args:
      workdir: receives `metrics.jsonl`.
      writers: additional writers.
      resumed: the step that the run resumes from, or None.
      clock: records slow steps.
      good: returns the step of the last checkpoint, or None.
    """
    self.tokens = 0
    self.late = reports.OneStepLate(self._train)
    self.workdir = workdir
    self._clock, self._good = clock, good
    first = jax.process_index() == 0
    self._file: reports.JsonlWriter | None = None
    self._writers: list[reports.Writer] = []
    if first:
      clock.resume(workdir / "metrics.jsonl", resumed)
      self._file = reports.JsonlWriter(workdir / "metrics.jsonl", resumed)
      self._writers = [
        self._file,
        *(make(workdir, resumed) for make in writers),
      ]
    self._bar = reports.progress_bar(steps, resumed or 0, shown=first)
    self.restart()

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    self._bar.close()
    for writer in self._writers:
      writer.close()

  def restart(self) -> None:
    """Restarts step timing, after time that was not spent on a step."""
    self._before = time.perf_counter()

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    for writer in self._writers:
      writer.scalars(step, values)

  def flush(self) -> None:
    """Flushes all lines to the file, before a checkpoint is saved."""
    if self._file is not None:
      self._file.flush()

  def _train(self, step: int, values: dict[str, float]) -> None:
    now = time.perf_counter()
    seconds, self._before = now - self._before, now
    self.tokens += int(values["tokens"])
    named = {f"train/{name}": value for name, value in values.items()}
    slow = self._clock.stepped(seconds)
    self.write(step, {**named, "train/seconds": seconds, **slow})
    rate = f"{values['tokens'] / seconds:.0f}"
    self._bar.set_postfix(
      {"loss": f"{values['loss']:.4f}", "tokens/s": rate}, refresh=False
    )
    self._bar.update()
    # The loss first: if it is not finite, the others are not either.
    for name, value in sorted(
      named.items(), key=lambda x: x[0] != "train/loss"
    ):
      if not math.isfinite(value):
        if values.get("misread"):
          raise UserError(
            f"{self.workdir}: {name} is {value} at step {step}: of the"
            f" projected matrices {values['misread']:.0f} were not read exactly"
            " once.\nExpected the loss to read each of them once, layer by"
            " layer; name fewer `matrices`, or\nuse galore.galore."
          )
        raise UserError(
          f"{self.workdir}: {name} is {value} at step {step}.\n"
          "Expected a finite number; lower the learning rate or clip, in a new"
          f" workdir{_again(self._good())}."
        )


def _again(good: int | None) -> str:
  # With another learning rate this workdir would reject the experiment.
  if good is None:
    return ": nothing had been saved"
  return (
    ". To resume from\nthe last good checkpoint, of step"
    f" {good}, copy checkpoints/ there"
  )
