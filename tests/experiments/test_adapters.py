"""The command: every operation, from files to files."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments import adapters, convert
from experiments.core import cli, config, train_eval
from research import tree, weights
from research.interop import convert as exporting
from research.interop import load, parts, sources
from research.lora import adapt, lora_factors
from research.lora.merge import merge
from research.quant.quantize import Quantize
from research.training.checkpoints.workdir import claim_workdir
from tests import support_golden, support_output

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests" / "golden" / "models"
GGUF = MODELS / "gguf_q4_0" / "model.gguf"
A, B = MODELS / "peft_lora", MODELS / "peft_rslora"


@pytest.fixture
def command(capsys):
  """Calls a command in this process: `(status, result, stderr)`."""

  def call(main, *arguments):
    status = cli.call(main, ["x", *map(str, arguments)])
    out = capsys.readouterr()
    lines = out.out.splitlines()
    result = json.loads(lines[-1]) if lines else None
    return status, result, support_output.errors(out.err)

  return call


def factors(folder):
  return lora_factors.factors(load.load_model(folder).params)


def test_a_sum_is_written_in_pefts_format(command, tmp_path):
  to = tmp_path / "out"
  status, result, errors = command(
    adapters.main,
    *("--op=cat", f"--from={A}", f"--from={B}", f"--to={to}"),
    *("--weight=0.7", "--weight=-0.3"),
  )
  assert (status, errors) == (0, "")
  assert (result["matrices"], result["min_rank"]) == (21, 8)
  config = json.loads((to / "adapter_config.json").read_text())
  assert config["r"] == config["lora_alpha"] == 8
  one, two, got = factors(A), factors(B), factors(to)
  for path, f in got.items():
    want = 0.7 * one[path].delta() - 0.3 * two[path].delta()
    np.testing.assert_allclose(f.delta(), want, atol=1e-6)


@pytest.mark.parametrize(
  "op, options",
  [
    ("svd", ["--rank=4"]),
    ("ties", ["--density=0.5", "--elect=frequency"]),
    ("dare_linear", ["--density=0.5", "--seed=1"]),
    ("ties_svd", ["--density=0.5", "--rank=4"]),
  ],
)
@pytest.mark.sample(3)
def test_other_sums(op, options, command, tmp_path):
  status, result, errors = command(
    adapters.main,
    *(f"--op={op}", f"--from={A}", f"--from={B}", f"--to={tmp_path / 'o'}"),
    *options,
  )
  assert (status, errors) == (0, "")
  assert result["max_rank"] == 4
  assert len(factors(tmp_path / "o")) == 21


def test_to_gguf_and_back(command, tmp_path):
  file, to = tmp_path / "a.gguf", tmp_path / "out"
  status, result, errors = command(
    convert.main, f"--from={B}", f"--to={file}", "--format=gguf-adapter"
  )
  assert (status, errors) == (0, "")
  assert result["tensors"] == 42
  status, _, errors = command(
    adapters.main,
    *("--op=cat", f"--from={file}", f"--base={MODELS / 'llama'}"),
    f"--to={to}",
  )
  assert (status, errors) == (0, "")
  want = factors(B)
  for path, f in factors(to).items():
    np.testing.assert_allclose(f.delta(), want[path].delta(), atol=1e-6)
  status, _, errors = command(
    convert.main,
    *(f"--from={MODELS / 'peftfull_saved'}", f"--to={tmp_path / 'b.gguf'}"),
    "--format=gguf-adapter",
  )
  assert status == 1
  assert "which adapters of llama.cpp cannot have" in errors


def test_conversion_by_energy(command, tmp_path):
  report = tmp_path / "report.json"
  status, result, errors = command(
    adapters.main,
    *("--op=lora", f"--from={A}", f"--to={tmp_path / 'o'}", "--energy=0.9"),
    f"--report={report}",
  )
  assert (status, errors) == (0, "")
  assert 0 < result["error"] <= 0.1**0.5
  rows = json.loads(report.read_text())
  assert max(row["rank"] for row in rows.values()) == result["max_rank"] <= 4
  assert {p: f.rank for p, f in factors(tmp_path / "o").items()} == {
    p: row["rank"] for p, row in rows.items()
  }


@pytest.mark.slow
def test_diagnosis_and_mitigation(command, tmp_path):
  picture = tmp_path / "a.png"
  status, result, errors = command(
    adapters.main, "--op=diagnose", f"--from={A}", f"--picture={picture}"
  )
  assert (status, errors) == (0, "")
  assert picture.is_file()
  assert 0 < result["means"]["relative"] < 1
  status, result, errors = command(
    adapters.main,
    *("--op=intruders", f"--from={A}", "--threshold=0.95"),
    f"--to={tmp_path / 'o'}",
  )
  assert (status, errors) == (0, "")
  assert result["intruders"] > 0
  assert len(factors(tmp_path / "o")) == 21


def test_fidelity(command):
  for options in (["--rounding=nearest"], ["--rounding=stochastic"]):
    status, result, errors = command(
      adapters.main,
      *("--op=fidelity", f"--from={A}", "--dtype=bfloat16", *options),
    )
    assert (status, errors) == (0, "")
    assert result["matrices"] == 21
    assert result["lost"] == max(0, 1 - result["kept"])
    assert abs(1 - result["kept"]) < result["noise"] < 1


@pytest.mark.slow
def test_merging_over_a_packed_base(command, tmp_path):
  """What was trained is kept by decoding the base, and by that alone."""
  packed = sources.open_source(MODELS / "gguf_q4_0" / "model.gguf")
  params = adapt.Adapt()(packed.params(), jax.random.key(0))
  moved = tree.map_paths(
    lambda path, x: (
      x + 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape)
      if "/trained/" in path
      else x
    ),
    params,
  )
  made, to = tmp_path / "adapted", tmp_path / "merged"
  exporting.to_orbax(
    dataclasses.replace(
      packed, params=lambda: moved, parts=parts.from_params(moved)
    ),
    made,
  )
  status, result, errors = command(
    adapters.main,
    *("--op=merge", f"--from={made}", f"--text={ROOT / 'LICENSE'}"),
    *(f"--original={MODELS / 'gguf_f32' / 'model.gguf'}", "--tokens=32"),
    *("--mode=requantized", f"--to={to}"),
  )
  assert (status, errors) == (0, "")
  kl = {mode: found["kl"] for mode, found in result["outputs"].items()}
  assert set(kl) == {"decoded", "requantized", "original"}
  assert abs(kl["decoded"]) < 1e-6
  assert kl["requantized"] > 1e-4 and kl["original"] > 1e-4
  written = sources.open_source(to).params()
  want = merge.merge_as(moved, "requantized")
  same = jax.tree.map(np.array_equal, written, want)
  assert all(jax.tree.leaves(same))
  assert sources.open_source(to).base_name is None


def test_modes_are_those_there_are(command):
  assert adapters.FLAGS["mode"].parser.enum_values == [*merge.MODES]
  status, _, errors = command(adapters.main, "--op=merge", "--mode=none")
  assert status == 2 and "--mode=none" in errors


@pytest.mark.slow
def test_a_run_merges_over_the_base_that_it_packed(command, tmp_path):
  """In NF4; the file that the adapter's directory names is in Q4_0."""
  file = MODELS / "gguf_q4_0" / "model.gguf"
  read = config.read(
    "runs/lora/qlora_smollm2.gin",
    [
      *("BATCH=2", "LENGTH=64", "EVAL_BATCHES=1", "EVAL_EVERY=2", "RANK=2"),
      *("WARMUP=1", "STEPS=2", "LEARNING_RATE=0.05"),
      "experiment.Experiment.prompt=None",
      f"experiment.Pretrained.name='{file}'",
    ],
  )
  run, to = claim_workdir(tmp_path / "run", read.text), tmp_path / "merged"
  train_eval.train(read.experiment, run)
  status, result, errors = command(
    adapters.main,
    *("--op=merge", f"--from={run}", f"--text={ROOT / 'LICENSE'}"),
    *("--tokens=32", f"--to={to}"),
  )
  assert status == 0, errors
  kl = {mode: found["kl"] for mode, found in result["outputs"].items()}
  assert abs(kl["decoded"]) < 1e-6 < 1e-5 < kl["requantized"]
  got = parts.from_params(sources.open_source(to).params())
  start = load.load_model(file).params
  packed = parts.from_params(Quantize()(start))
  start = parts.from_params(start)
  read = {str(address): address for address in got}
  for path, f in factors(run).items():
    x = got[read[path]].read() - np.asarray(f.delta())
    np.testing.assert_allclose(
      x, weights.dense(packed[read[path]].read()), atol=1e-5
    )
    assert np.abs(x - start[read[path]].read()).max() > 1e-3


def test_rules(command, tmp_path):
  folder = tmp_path / "a"
  shutil.copytree(A, folder)
  path = folder / "adapter_config.json"
  config = json.loads(path.read_text())
  config["base_model_name_or_path"] = str(MODELS / "llama")
  config["rank_pattern"] = {"q_proj": 4, "layers.0.*": 8, "x_proj": 2}
  path.write_text(json.dumps(config))
  status, result, _ = command(
    adapters.main, "--op=validate", f"--from={folder}"
  )
  assert status == 0
  kinds = [f["kind"] for f in result["findings"]]
  assert kinds == ["nothing", "order"]


@pytest.mark.parametrize(
  "module", ["model.language_model.", "model.", "language_model.model."]
)
def test_rules_have_the_names_that_the_file_has(module, command, tmp_path):
  """Of Gemma 3: its class with images, that without, and the older one."""
  folder, base = tmp_path / "a", tmp_path / "base"
  base.mkdir()
  support_golden.write(base, "gemma3")
  shutil.copytree(support_golden.GOLDEN / "vlm_peft" / "gemma3", folder)
  path, new = folder / "adapter_config.json", "model.language_model."
  config = json.loads(path.read_text())
  config["base_model_name_or_path"] = str(base)
  config["target_modules"] = [
    name.replace(new, module) for name in config["target_modules"]
  ]
  path.write_text(json.dumps(config))
  file = folder / "adapter_model.safetensors"
  tensors = safetensors.numpy.load_file(file)
  safetensors.numpy.save_file(
    {
      k.replace(f"model.{new}", f"model.{module}"): x
      for k, x in tensors.items()
    },
    file,
  )
  status, result, errors = command(
    adapters.main, "--op=validate", f"--from={folder}"
  )
  assert (status, result["findings"]) == (0, []), errors


def test_a_lossy_merge_is_refused_unless_asked_for(command, tmp_path):
  """A small update of a base in bf16, whose numbers it does not move."""
  small, to, base = (tmp_path / name for name in ("small", "hf", "base"))
  status, _, errors = command(
    convert.main,
    *(f"--from={MODELS / 'llama'}", f"--to={base}", "--format=hf"),
    "--dtype=bfloat16",
  )
  assert (status, errors) == (0, "")
  weight = "--weight=0.003"
  status, _, errors = command(
    adapters.main, "--op=cat", f"--from={A}", weight, f"--to={small}"
  )
  assert (status, errors) == (0, "")
  path = small / "adapter_config.json"
  config = json.loads(path.read_text())
  config["base_model_name_or_path"] = str(base)
  path.write_text(json.dumps(config))
  options = [f"--from={small}", "--format=hf", f"--to={to}"]
  status, _, errors = command(convert.main, *options)
  assert status == 1
  assert "of the adapter's update would be left" in errors
  assert not to.exists()
  status, result, errors = command(convert.main, *options, "--lossy")
  assert (status, errors) == (0, "")
  assert result["merge_kept"] < 0.9
  shutil.rmtree(to)
  status, kept, _ = command(
    convert.main, *options, "--rounding=stochastic", "--lossy"
  )
  assert status == 0
  assert abs(kept["merge_kept"] - 1) < abs(result["merge_kept"] - 1)


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--op=cat"], "--from: is missing"),
    (["--op=mean", f"--from={A}"], "expected one of cat, svd"),
    (["--op=cat", f"--from={A}"], "--to: is missing"),
    (["--op=cat", f"--from={MODELS / 'llama'}", "--to=x"], "found a model"),
    (["--op=cat", f"--from={GGUF}", "--to=x"], "--base: is missing"),
    (
      ["--op=merge", f"--from={MODELS / 'llama'}", "--to=x"],
      "one model with adapters",
    ),
    (["--op=merge", f"--from={A}"], "--text"),
    (["--op=merge", f"--from={A}", f"--from={B}"], "one model with adapters"),
    (["--op=merge", f"--from={A}", "--to=x"], "not how the"),
    (["--op=merge", f"--from={GGUF}", f"--to={A}"], "is already there"),
    (
      ["--op=merge", f"--from={GGUF}", "--to=y", "--mode=original"],
      "--original",
    ),
    (["--op=merge", f"--from={GGUF}", "--text=none.txt"], "none.txt"),
    (["--op=lora", f"--from={A}", "--to=x"], "either --rank or --energy"),
    (["--op=lora", f"--from={A}", f"--from={B}", "--rank=2", "--to=x"], "one"),
    (
      ["--op=cat", f"--from={A}", f"--from={B}", "--weight=1", "--to=x"],
      "2 adapters and 1 weights",
    ),
  ],
)
def test_wrong_flags(command, arguments, words):
  status, result, errors = command(adapters.main, *arguments)
  assert (status, result) == (1, None)
  assert words in errors
  assert errors.count("\n") <= 3


OPTIONS = {
  **dict(weight="1", rank="2", density="0.5", elect="total", seed="1"),
  **dict(energy="0.9", top="5", threshold="0.5", strength="0.5", to="x"),
  **dict(picture="x", text="x", tokens="8", dtype="float32", base="x"),
  **dict(rounding="nearest", mode="decoded", original="x", report="x"),
}
SUM = {"to", "base", "report", "weight"}
TAKES = {
  "cat": SUM,
  "svd": SUM | {"rank"},
  "linear": SUM,
  "ties": SUM | {"density", "elect"},
  "ties_svd": SUM | {"density", "elect", "rank"},
  "dare_linear": SUM | {"density", "seed"},
  "dare_linear_svd": SUM | {"density", "seed", "rank"},
  "dare_ties": SUM | {"density", "elect", "seed"},
  "dare_ties_svd": SUM | {"density", "elect", "seed", "rank"},
  "magnitude_prune": SUM | {"density"},
  "magnitude_prune_svd": SUM | {"density", "rank"},
  "lora": {"to", "base", "report", "rank", "energy"},
  "intruders": {"to", "base", "report", "top", "threshold", "strength"},
  "diagnose": {"base", "report", "top", "threshold", "energy", "picture"},
  "fidelity": {"base", "report", "text", "tokens"}
  | {"dtype", "rounding", "seed"},
  "validate": set(),
  "merge": {"to", "report", "text", "tokens", "mode", "original"},
}


def test_options_that_an_operation_ignores_are_refused(command):
  assert set(OPTIONS) == set(adapters.FLAGS) - {"op", "from"} - {
    *cli.new_flags()
  }
  assert list(adapters.OPERATIONS.table) == list(TAKES)
  for op, takes in TAKES.items():
    for name in set(OPTIONS) - takes:
      status, _, errors = command(
        adapters.main,
        *(f"--op={op}", f"--from={GGUF}", f"--{name}={OPTIONS[name]}"),
      )
      assert status == 1
      assert f"--{name}: is for --op=" in errors
      assert f"found --op={op}; leave it out" in errors


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--op=fidelity", "--tokens=8"], "--tokens: is for --text, which is"),
    (["--op=merge", "--to=y", "--tokens=8"], "--tokens: is for --text"),
    (["--op=fidelity", "--seed=1"], "no effect with --rounding=nearest"),
    (["--op=merge", "--text=x", "--mode=decoded"], "--mode: is for --to"),
    (["--op=merge", "--to=y", "--original=x"], "--original: is for --mode="),
  ],
)
def test_options_without_effect_are_refused(command, arguments, words):
  status, _, errors = command(adapters.main, f"--from={GGUF}", *arguments)
  assert status == 1
  assert words in errors


def test_help_names_operations_and_their_options(capsys):
  assert cli.call(adapters.main, ["x", "--help"]) == 0
  text = " ".join(capsys.readouterr().out.split())
  for op in TAKES:
    assert op in text
  assert "By default 0.9." in text
  assert "The model that the base was quantized from. For merge." in text
