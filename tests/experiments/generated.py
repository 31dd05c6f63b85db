"""What tests of `generate` share: a tiny model, the command, what it says."""

import json
import pathlib

from experiments import generate
from experiments.core import cli
from tests import support_output

MODELS = pathlib.Path(__file__).parents[1] / "golden" / "models"
TINY = MODELS / "gguf_f32" / "model.gguf"


def command(capsys):
  """Runs generate in this process: (status, stdout lines, stderr)."""

  def call(*arguments):
    status = cli.call(generate.main, ["command", *map(str, arguments)])
    out = capsys.readouterr()
    return status, out.out.splitlines(), support_output.errors(out.err)

  return call


def of_tiny(capsys):
  """Runs it with the tiny model, for 12 tokens."""
  call, given = command(capsys), (f"--model={TINY}", "--max_new_tokens=12")
  return lambda *arguments: call(*given, *arguments)


def told(done):
  """Returns what a command that did its work says of it."""
  status, lines, errors = done
  assert (status, errors) == (0, "")
  return json.loads(lines[-1])
