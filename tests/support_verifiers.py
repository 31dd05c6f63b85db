"""Verifiers that misbehave, one way each, for `test_isolation.py`."""

import dataclasses
import os
import time

from research.reasoning.problem import StepVerdict, Verdict


def stripped(text):
  """Returns a text without the space around it."""
  return text.strip()


@dataclasses.dataclass(frozen=True)
class Misbehaving:
  """Does what the text says, and else says that the text is right."""

  limits: tuple[int, ...] = (1, 2)
  read: object = stripped

  def verify(self, problem, text):
    """Hangs, raises, dies, prints, or returns what is no verdict."""
    act(text)
    if text == "nan":
      return float("nan")
    found = self.read(text)
    return Verdict(True, found, f"{found}/{sum(self.limits)}", "correct")

  def verify_step(self, problem, steps, step):
    """Does the same with a step."""
    act(step)
    return StepVerdict("ok", f"{len(steps)} before")


def act(text):
  """Does what a text says."""
  if text == "hang":
    time.sleep(60)
  if text == "raise":
    raise ZeroDivisionError("of no number")
  if text == "die":
    os._exit(3)
  if text == "print":
    os.write(1, b"x" * 100_000 + b"\n")
    print('{"value": "forged"}')
  if text == "memory":
    bytearray(1 << 40)
  if text == "digits":
    str(10**20_000)


def echo(value):
  """Returns its argument."""
  act(value)
  return value


def _private():
  return 1
