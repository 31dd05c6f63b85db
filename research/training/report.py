"""Everything that a step's numbers go to: files, the bar, the check."""

import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any

from research.training import metrics as reports
from research.typing import UserError


class Clock:
  """Seconds by what was being done."""

  def __init__(self):
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def doing(self, what: str):
    """Adds the time spent inside to `what`."""
    begin = time.perf_counter()
    try:
      yield
    finally:
      spent = time.perf_counter() - begin
      self.seconds[what] = self.seconds.get(what, 0.0) + spent


class Report:
  """Everything that a step's numbers go to."""

  def __init__(self, workdir, writers, resumed: int | None, steps: int):
    self.tokens = 0
    self.late = reports.OneStepLate(self._train)
    self.workdir = workdir
    self._writers = [
      reports.JsonlWriter(workdir / "metrics.jsonl", resumed),
      *(make(workdir, resumed) for make in writers),
    ]
    self._bar = reports.progress_bar(steps, resumed or 0)
    self.restart()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._bar.close()
    for writer in self._writers:
      writer.close()

  def restart(self) -> None:
    """Starts timing anew: what came before was no step."""
    self._before = time.perf_counter()

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    for writer in self._writers:
      writer.scalars(step, values)

  def _train(self, step: int, values: dict[str, float]) -> None:
    now = time.perf_counter()
    seconds, self._before = now - self._before, now
    self.tokens += int(values["tokens"])
    named = {f"train/{name}": value for name, value in values.items()}
    self.write(step, {**named, "train/seconds": seconds})
    rate = f"{values['tokens'] / seconds:.0f}"
    self._bar.set_postfix(
      {"loss": f"{values['loss']:.4f}", "tokens/s": rate}, refresh=False
    )
    self._bar.update()
    # The loss first: what is wrong with it is wrong with all others too.
    for name, value in sorted(
      named.items(), key=lambda x: x[0] != "train/loss"
    ):
      if not math.isfinite(value):
        raise UserError(
          f"{self.workdir}: {name} is {value} at step {step}.\n"
          "Expected a finite number; lower the learning rate or clip, then"
          " resume from the last checkpoint."
        )
