"""The command: a tiny model quantized, written, loaded, and generated with."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import generate, perplexity, quantize
from experiments.core import cli, config
from experiments.quantizing import quantizing
from research import weights
from research.interop import load
from research.quant.algorithms.calibrate import Calibration
from tests import support_output

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "golden" / "models" / "gguf_mixed" / "model.gguf"
SMALL = (
  f"--set=experiment.Pretrained.name='{MODEL}'",
  "--set=WINDOWS=4",
  "--set=LENGTH=32",
  "--set=BLOCK=32",
)
RUNS = sorted(
  str(path.relative_to(config.CONFIGS))
  for path in config.CONFIGS.glob("runs/quant/*.gin")
  if "models/smollm2_quantized.gin" in path.read_text("utf-8")
)


@pytest.fixture
def command(capsys):
  """Calls a command in this process: `(status, result, stderr, lines)`."""

  def call(of, *arguments):
    status = cli.call(of.main, ["command", *map(str, arguments)])
    out = capsys.readouterr()
    lines = out.out.splitlines()
    result = json.loads(lines[-1]) if status == 0 else None
    return status, result, support_output.errors(out.err), lines

  return call


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A quantized tiny model's directory, and what the command returned."""
  to = tmp_path_factory.mktemp("quantized") / "model"
  flags = ["quantize", "--config=runs/quant/gptq_smollm2.gin", f"--to={to}"]
  results = []

  def main(argv):
    results.append(quantize.main(argv))
    return results[-1]

  main.__module__ = quantize.__name__
  assert cli.call(main, [*flags, *SMALL]) == 0
  return to, results[0]


@pytest.mark.slow
def test_what_is_written(written):
  to, result = written
  (report,) = json.loads((to / "quantize.json").read_text())
  rows = report["matrices"]
  assert len(rows) == result["matrices"] > 0
  assert result["failed"] == 0 and result["bits_per_weight"] < 5
  assert result["output_error"] < result["nearest_error"]
  assert all(row["format"].startswith("int4") for row in rows)
  windows = report["calibration"]
  found = Calibration(windows=4, length=32).read(
    load.load_model(MODEL).tokenizer
  )
  assert windows == found.record()
  again, _ = config.read(str(to / "quantize.gin"), root=quantizing.Job)
  assert again.transforms[0].calibration.windows == 4


def test_it_is_a_model_of_ours(written, command, tmp_path):
  to, _ = written
  packed = load.load_model(to, packed=True)
  leaves = jax.tree.leaves(packed.params, is_leaf=weights.is_weight)
  assert sum(map(weights.is_weight, leaves)) > 0
  decoded = load.load_model(to)
  tokens = jax.numpy.arange(8)[None]
  one, _ = packed.model.apply({"params": packed.params}, tokens)
  two, _ = decoded.model.apply({"params": decoded.params}, tokens)
  np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)
  text = tmp_path / "text"
  text.write_text("Some words, to be read by the model. " * 5)
  status, result, errors, _ = command(
    perplexity, f"--model={to}", f"--text={text}", "--window=16", "--packed"
  )
  assert (status, errors) == (0, "") and np.isfinite(result["perplexity"])
  status, _, errors, _ = command(
    generate, f"--model={to}", "--prompt=Some", "--max_new_tokens=2"
  )
  assert (status, errors) == (0, "")


def test_the_same_command_makes_the_same_model(written, command, tmp_path):
  to, first = written
  status, result, errors, lines = command(
    quantize,
    f"--config={to / 'quantize.gin'}",
    f"--to={tmp_path / 'again'}",
    "--table",
  )
  assert (status, errors) == (0, "")
  assert result["output_error"] == first["output_error"]
  assert any(line.startswith("layer 1/") for line in lines)
  assert any(line.split()[:1] == ["matrix"] for line in lines)
  both = [
    load.load_model(p, packed=True).params for p in (to, tmp_path / "again")
  ]
  jax.tree.map(np.testing.assert_array_equal, *both)


@pytest.mark.parametrize(
  "flags, says",
  [
    (["--to=x"], "--config: is missing"),
    (["--config=runs/quant/gptq_smollm2.gin"], "--to: is missing"),
    (["--config=no.gin", "--to=x"], "no such file"),
    (["--config=runs/quant/gptq_smollm2.gin", "--to=.", *SMALL], "already"),
    (
      [
        "--config=runs/quant/gptq_smollm2.gin",
        "--to=x",
        *(x for x in SMALL if "BLOCK" not in x),
        "--set=BLOCK=48",
      ],
      "no multiple of its block of 48",
    ),
    (
      [
        "--config=runs/quant/gptq_smollm2.gin",
        "--to=x",
        *(x for x in SMALL if "WINDOWS" not in x),
        "--set=WINDOWS=1000000",
      ],
      "Give more text, or ask for fewer or shorter windows",
    ),
  ],
)
def test_what_cannot_be_is_said(command, flags, says, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "file").touch()
  status, _, errors, _ = command(quantize, *flags)
  assert status == 1 and says in errors
  assert len(errors.splitlines()) <= 3
  assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_scales_of_activations_that_a_text_told_are_kept(tmp_path, command):
  to = tmp_path / "static"
  name = "runs/quant/smoothquant_static_smollm2.gin"
  done = command(quantize, f"--config={name}", f"--to={to}", *SMALL[:3])
  assert done[0] == 0, done
  loaded = load.load_model(to, packed=True)
  layer = loaded.params["run0"]["layer0"]
  q, down = layer["attention"]["q"], layer["mlp"]["down"]
  assert q.op.per == "tensor" and q.scale.shape == (2,)
  assert down.op.per == "token" and down.scale is None
  one = jax.tree.map(lambda x: x[1], q)
  # Beyond what the text had, and a token at a time, scales stay the text's.
  x = jnp.linspace(-1, 1, one.shape[0])[None] * 3 * 127 * one.scale
  want = np.asarray(one.op(x, one.scale)) @ np.asarray(one.w.dense())
  assert np.abs(one.op(x, one.scale)).max() <= 128 * one.scale * (1 + 1e-6)
  got = weights.einsum("td,df->tf", x, one)
  # Products of 8 bits and their sums are exact, scales are rounded.
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
  status, result, errors, _ = command(
    generate, f"--model={to}", "--prompt=Some", "--max_new_tokens=4"
  )
  assert (status, errors) == (0, "") and result["tokens"] > 0


@pytest.mark.parametrize("run", RUNS)
def test_run_files_can_be_read(run):
  job, text = config.read(run, root=quantizing.Job)
  assert job.transforms and "smollm2-135m" in text
