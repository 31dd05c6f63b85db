"""What tests of `generate --sampler=diffusion` share: models, a command."""

from experiments import convert
from experiments.core import cli
from tests.experiments import generated
from tests.experiments.generated import TINY

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
  """Runs generate to fill masks: (status, stdout lines, stderr)."""
  run = generated.command(capsys)

  def call(name, *arguments):
    def given(flag):
      return any(a.startswith(f"--{flag}") for a in arguments)

    more = [f"--model={places.get(name, name)}"]
    more += [] if given("sampler") else ["--sampler=diffusion"]
    if not given("infill"):
      more += [f"--max_new_tokens={LENGTH}"]
      more += [] if given("prompt") else ["--prompt=the cat"]
    return run(*more, *arguments)

  return call
