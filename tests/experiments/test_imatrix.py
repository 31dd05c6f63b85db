"""The commands: importances of a tiny model, and a file made by them."""

import json

import numpy as np
import pytest

from experiments import convert, imatrix
from experiments.core import cli
from research.interop import gguf
from research.interop.gguf import imatrix as gguf_imatrix
from research.interop.gguf import tensor_types
from tests import support_gguf, support_output


@pytest.fixture
def command(capsys):
  """Calls a command in this process: `(status, result, stdout, stderr)`."""

  def call(main, *arguments):
    status = cli.call(main, ["command", *map(str, arguments)])
    out = capsys.readouterr()
    lines = out.out.splitlines()
    result = json.loads(lines[-1]) if lines and not status else None
    return status, result, out.out, support_output.errors(out.err)

  return call


def test_importances_are_collected_and_weigh_a_file(command, tmp_path):
  model, weighed = tmp_path / "model.gguf", tmp_path / "weighed.gguf"
  support_gguf.write(model)
  text, to = tmp_path / "text.txt", tmp_path / "imatrix.gguf"
  text.write_text("the rain in the other thing, again and again. " * 20)
  flags = (f"--model={model}", f"--to={to}", f"--text={text}")
  status, result, _, errors = command(
    imatrix.main, *flags, "--windows=2", "--window=16"
  )
  assert (status, errors) == (0, "")
  assert (result["matrices"], result["tokens"]) == (14, 32)
  found = gguf_imatrix.read(to)
  assert found.datasets == ("text.txt",)
  # Another seed samples other windows of the text.
  other = tmp_path / "other.gguf"
  flags = (f"--model={model}", f"--to={other}", f"--text={text}", "--seed=1")
  command(imatrix.main, *flags, "--windows=2", "--window=16")
  name, means = next(iter(found.means().items()))
  assert not np.allclose(gguf_imatrix.read(other).means()[name], means)

  flags = (f"--from={model}", f"--to={weighed}", "--format=gguf:Q3_K_M")
  status, _, _, errors = command(convert.main, *flags)
  assert status != 0
  assert "rows of 32 weights, which" in errors
  assert "--fallback" in errors
  status, result, out, errors = command(
    convert.main, *flags, "--fallback", f"--imatrix={to}"
  )
  assert status == 0
  assert "blocks do not divide the rows of" in out + errors
  assert result["fallbacks"] == {"Q4_K -> Q5_0": 4}
  new, old = (gguf.open_gguf(f).tensors for f in (weighed, model))
  size = sum(t.data.size for t in new.values())
  count = sum(np.prod(t.shape) for t in new.values())
  assert result["bits_per_weight"] == pytest.approx(8 * size / count)
  for layer in (0, 1):
    name = f"blk.{layer}.ffn_up.weight"
    want = tensor_types.encode("Q3_K", old[name].decode(), found.means()[name])
    np.testing.assert_array_equal(new[name].data, want)


@pytest.mark.parametrize("flag", ["--fallback", "--imatrix=x"])
def test_flags_of_gguf_are_for_gguf(flag, command, tmp_path):
  status, _, _, errors = command(
    convert.main, "--from=smollm2-135m", f"--to={tmp_path}", "--format=hf", flag
  )
  assert status != 0
  assert "is for --format=gguf, found --format=hf" in errors
