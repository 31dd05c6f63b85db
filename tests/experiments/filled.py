"""What tests of `generate --sampler=diffusion` share: models, a command."""

import json
import pathlib

from experiments import cli, convert, generate

MODELS = pathlib.Path(__file__).parents[1] / "golden" / "models"
TINY = MODELS / "gguf_f32" / "model.gguf"
LENGTH = 8


def converted(root):
  """Converted models: all tokens see each other, or blocks of 1 and of 4."""
  kinds = {"all": (), "one": ("--block=1",), "four": ("--block=4",)}
  for name, more in kinds.items():
    kind = "orbax" if name == "four" else "hf"
    flags = f"--from={TINY}", f"--to={root / name}", f"--format={kind}"
    arguments = ["command", *flags, "--mask_token=new", *more]
    assert cli.call(convert.main, arguments) == 0
  return {name: root / name for name in kinds}


def command(capsys, places):
  """Runs generate in this process: (status, stdout lines, stderr)."""

  def call(name, *arguments):
    def given(flag):
      return any(a.startswith(f"--{flag}") for a in arguments)

    more = [f"--model={places.get(name, name)}"]
    more += [] if given("sampler") else ["--sampler=diffusion"]
    if not given("infill"):
      more += [f"--max_new_tokens={LENGTH}"]
      more += [] if given("prompt") else ["--prompt=the cat"]
    status = cli.call(generate.main, ["command", *more, *arguments])
    out = capsys.readouterr()
    return status, out.out.splitlines(), out.err

  return call


def told(done):
  """Returns what a command that did its work says of it."""
  status, lines, errors = done
  assert (status, errors) == (0, "")
  return json.loads(lines[-1])
