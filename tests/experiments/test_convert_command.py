"""The command: flags, the report, and a run through every format."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import convert
from experiments.converting import conversion
from experiments.core import cli
from research import tree
from research.interop import hf, load, peft
from research.interop.gguf import recipe as gguf_recipe
from research.interop.quantized import checkpoint_formats
from research.io import safetensors
from research.lora import adapt
from research.lora.methods.lora import LoRA
from research.typing import UserError
from tests import support_output

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODELS = ROOT / "tests" / "golden" / "models"
GGUF = MODELS / "gguf_f32" / "model.gguf"


@pytest.fixture
def command(capsys):
  """Calls the command in this process: `(status, result, stderr)`."""

  def call(*arguments):
    status = cli.call(convert.main, ["convert", *map(str, arguments)])
    out = capsys.readouterr()
    lines = out.out.splitlines()
    result = json.loads(lines[-1]) if lines else None
    return status, result, support_output.errors(out.err)

  return call


def test_around_all_formats(command, tmp_path):
  steps = [
    (MODELS / "gguf_mixed" / "model.gguf", "a", "orbax"),
    ("a", "b.gguf", "gguf"),
    ("b.gguf", "c", "hf"),
    ("c", "d", "orbax"),
    ("d", "e.gguf", "gguf:f32"),
    ("e.gguf", "f", "hf"),
  ]
  for source, to, form in steps:
    status, result, errors = command(
      f"--from={tmp_path / source}", f"--to={tmp_path / to}", f"--format={form}"
    )
    assert (status, errors) == (0, "")
    assert result["changed"] == 0
    assert result["tokenizer"]
    assert result["bytes"] > 10_000
  first = load.load_model(MODELS / "gguf_mixed" / "model.gguf")
  last = load.load_model(tmp_path / "f")
  assert last.model == first.model.clone(
    stack=last.model.stack
  )  # scales of logits are spelled out
  for name, tensor in safetensors.open_directory(tmp_path / "c").items():
    again = safetensors.open_directory(tmp_path / "f")[name]
    np.testing.assert_array_equal(again.read(), tensor.read())


@pytest.mark.parametrize(
  "flags",
  [
    ["--format=hf"],
    ["--format=hf", "--mask_token=new"],
    ["--format=gptq", "--requantize", "--group_size=32"],
    ["--format=bnb", "--requantize"],
    ["--format=orbax"],
  ],
  ids=lambda flags: " ".join(flags),
)
@pytest.mark.sample(4)
def test_the_class_is_named(command, tmp_path, flags):
  """Of a file that had no config.json; tools find their class by it."""
  file = MODELS / "gguf_mixed" / "model.gguf"
  done = command(f"--from={file}", f"--to={tmp_path / 'a'}", *flags)
  assert done[0] == 0, done
  config = safetensors.read_json(tmp_path / "a" / "config.json")
  assert config["architectures"] == ["LlamaForCausalLM"]
  # A checkpoint of before, and by hand: neither has it.
  del config["architectures"]
  safetensors.write_json(tmp_path / "a" / "config.json", config)
  if "--mask_token=new" in flags or "--requantize" in flags:
    return
  done = command(f"--from={tmp_path / 'a'}", f"--to={tmp_path / 'b'}", *flags)
  assert done[0] == 0, done
  config = safetensors.read_json(tmp_path / "b" / "config.json")
  assert config["architectures"] == ["LlamaForCausalLM"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
  """Returns an adapter's directory, whose base has a tokenizer."""
  file = MODELS / "gguf_mixed" / "model.gguf"
  made, base = tmp_path_factory.mktemp("adapter"), load.load_model(file)
  adapted = adapt.Adapt(method=LoRA(rank=2))(base.params, jax.random.key(0))
  adapted = tree.map_paths(
    lambda path, x: jnp.ones_like(x) if path.endswith("/b") else x, adapted
  )
  peft.save_adapter(made, adapted, base.model, str(file))
  return made


@pytest.mark.slow
def test_a_merged_adapter_has_its_bases_tokenizer(command, adapter, tmp_path):
  merged = command(f"--from={adapter}", f"--to={tmp_path}", "--format=hf")
  assert merged[0] == 0 and merged[1]["tokenizer"], merged
  assert (tmp_path / "tokenizer.json").is_file()
  config = safetensors.read_json(tmp_path / "config.json")
  assert config["architectures"] == ["LlamaForCausalLM"]


def test_an_adapters_tokenizer_is_its_bases(command, adapter, tmp_path):
  for form in ("peft", "gguf-adapter"):
    to = tmp_path / form
    status, result, errors = command(
      f"--from={adapter}", f"--to={to}", f"--format={form}"
    )
    assert (status, errors) == (0, "")
    found = (
      [p for p in to.iterdir() if "token" in p.name] if to.is_dir() else []
    )
    assert not found and not result["tokenizer"]


def test_the_report(command, tmp_path):
  report = tmp_path / "report.json"
  status, result, _ = command(
    f"--from={MODELS / 'peft_lora'}",
    f"--to={tmp_path / 'merged'}",
    "--format=hf",
    "--dtype=bfloat16",
    "--shard_size=20kB",
    f"--report={report}",
  )
  assert status == 0
  rows = json.loads(report.read_text())
  assert len(rows) == result["tensors"]
  assert result["merged"] == sum(r["fidelity"] is not None for r in rows) == 21
  assert result["merge_loss"] == max(0, 1 - result["merge_kept"])
  assert 0 < result["merge_noise"] <= max(r["fidelity"] or 0 for r in rows) < 1
  missed = {r["name"]: (r["fidelity"] or 0) * (r["update"] or 0) for r in rows}
  assert result["merge_worst"] == max(missed, key=missed.get)
  assert result["max_abs_error"] == max(r["max_abs_error"] for r in rows) > 0
  assert (tmp_path / "merged" / safetensors.INDEX).is_file()


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--format=hf"], "--from: is missing"),
    (
      [f"--from={GGUF}", "--to=y", "--format=gptq:5"],
      "expected one of hf, gguf,",
    ),
    (
      [f"--from={GGUF}", "--to=y", "--format=awq:4"],
      "expected one of hf, gguf,",
    ),
    ([f"--from={GGUF}", "--to=y", "--format=pt"], "expected one of hf, gguf,"),
    (
      [f"--from={GGUF}", "--to=y", "--format=hf:F16"],
      "expected one of hf, gguf,",
    ),
    (["--from=x", "--to=y", "--format=hf"], "x: no such file or directory"),
    (
      [f"--from={GGUF}", "--to=y", "--format=hf", "--shard_size=0"],
      "--shard_size=0: expected a number of bytes",
    ),
    (
      [f"--from={GGUF}", "--to=y", "--format=gguf", "--dtype=float32"],
      "--dtype: is for --format=hf",
    ),
  ],
)
def test_wrong_flags(command, arguments, words):
  status, result, errors = command(*arguments)
  assert (status, result) == (1, None)
  assert words in errors
  assert errors.count("\n") <= 3


@pytest.mark.parametrize(
  "form, flag",
  [
    *(("peft", "--lossy"), ("gguf-adapter", "--lossy"), ("orbax", "--lossy")),
    *(("bnb", "--group_size=32"), ("gguf", "--mask_token=new")),
    *(("orbax", "--rounding=nearest"), ("hf", "--base=x")),
  ],
)
def test_options_that_a_format_ignores_are_refused(command, form, flag):
  status, _, errors = command(
    f"--from={GGUF}", "--to=y", f"--format={form}", flag
  )
  assert status == 1
  assert f"{flag.partition('=')[0]}: is for --format=" in errors
  assert f"found --format={form}; leave it out" in errors


def test_help_names_every_format_and_type():
  text = " ".join(cli.describe(convert.main).split())
  assert [
    t for t in gguf_recipe.FILE_TYPES if not re.search(rf"\b{t}\b", text)
  ] == []
  table = convert.FORMATS.table
  assert [x for x in table if f" {x}" not in text] == []
  kinds = table["compressed-tensors"].argument.metadata["values"]
  assert kinds == tuple(checkpoint_formats.COMPRESSED)
  assert f"<{'|'.join(hf.DTYPES)}>: Type of what is not packed" in text
  assert hf.DTYPES == ("float32", "bfloat16", "float16")


def test_an_unknown_type_of_gguf(command, tmp_path):
  status, _, errors = command(
    f"--from={MODELS / 'llama'}", f"--to={tmp_path / 'x'}", "--format=gguf:Q9_K"
  )
  assert status == 1
  assert "gguf:Q9_K: expected one of F32, F16" in errors


@pytest.mark.parametrize(
  "text, want", [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("1MiB", 2**20)]
)
def test_sizes(text, want):
  assert conversion.parse_bytes(text) == want
  with pytest.raises(UserError):
    conversion.parse_bytes(text + "x")


_STREAM = """
import json, pathlib, resource, sys
import numpy as np
from research.interop import convert, hf, sources
from research.interop.gguf import recipe as gguf_recipe
from research.io import safetensors
folder, to, form = sys.argv[1:]
source = sources.open_source(folder)
tiny = sources.open_source(folder + '/../tiny')
convert.to_hf(tiny, pathlib.Path(to + 'w'))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if form == 'hf':
  convert.to_hf(source, pathlib.Path(to), 'float32', 20_000_000)
else:
  convert.to_gguf(source, pathlib.Path(to), gguf_recipe.Recipe(form))
status = pathlib.Path('/proc/self/status').read_text()
anonymous = [x for x in status.splitlines() if x.startswith('RssAnon')][0]
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([before, after, int(anonymous.split()[1])]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "Q8_0"])
@pytest.mark.skipif(sys.platform != "linux", reason="counts Linux's pages")
@pytest.mark.sample(2, 1)
def test_a_large_model_passes_through_a_little_memory(form, tmp_path):
  """200 MB of weights; pages of the mapped source are not ours to count."""
  layers, width = 12, 640
  config = json.loads((MODELS / "llama" / "config.json").read_text()) | dict(
    hidden_size=width,
    intermediate_size=4 * width,
    num_hidden_layers=layers,
    num_attention_heads=10,
    num_key_value_heads=10,
    vocab_size=4096,
    torch_dtype="bfloat16",
  )
  from research.interop import hf, parts
  from research.interop.hf import config as hf_config
  from research.nn import presets

  shutil.copytree(MODELS / "llama", tmp_path / "tiny")
  model = presets.transformer(*hf_config.sizes_from_config(config))
  rows, folder = hf.table(model), tmp_path / "big"
  folder.mkdir()
  tensors = {}
  for slot in parts.slots(model):
    for address in slot.addresses:
      name, turned = rows.theirs(address)
      shape = slot.one[::-1] if turned else slot.one
      tensors[name] = np.full(shape, 0.01, safetensors.DTYPES["BF16"])
  safetensors.write_directory(folder, tensors)
  safetensors.write_json(folder / "config.json", config)
  size = sum(x.nbytes for x in tensors.values())
  assert size > 150e6
  out = subprocess.run(
    [sys.executable, "-c", _STREAM, folder, tmp_path / "out", form],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  before, after, anonymous = json.loads(out.splitlines()[-1])
  # The source's own pages (mapped), and no second copy of the model: the
  # largest tensor has 7 MB, in float64 and with its error 60 MB.
  assert (after - before) * 1024 < size + 120e6
  assert anonymous * 1024 < 400e6


@pytest.mark.slow
def test_an_interrupted_run_exports_what_a_finished_one_leaves(
  command, tmp_path, capsys
):
  """Over a base that it packed: no matrix of that is the adapter's."""
  from experiments.core import config, train_eval
  from research.training.checkpoints.workdir import claim_workdir

  name = MODELS / "gguf_q4_1" / "model.gguf"
  read = config.read(
    "runs/lora/qlora_smollm2.gin",
    [
      *("BATCH=2", "LENGTH=64", "EVAL_BATCHES=1", "EVAL_EVERY=2"),
      *("WARMUP=1", "STEPS=2", "experiment.Experiment.prompt=None"),
      f"experiment.Pretrained.name='{name}'",
    ],
  )
  workdir = claim_workdir(tmp_path / "run", read.text)
  result = train_eval.train(read.experiment, workdir)
  again = load.load_model(workdir, packed="any")
  assert (
    sum(x.nbytes for x in jax.tree.leaves(again.params))
    == (result["parameter_bytes"])
  )
  finished = tmp_path / "finished"
  (workdir / "adapter").rename(finished)
  shutil.rmtree(workdir / "model")
  capsys.readouterr()
  status, _, errors = command(
    f"--from={workdir}", f"--to={tmp_path / 'a'}", "--format=peft"
  )
  assert (status, errors) == (0, "")
  for file in finished.iterdir():
    assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_a_run_that_trained_the_whole_model(command, tmp_path, capsys):
  """Its best checkpoint is rebuilt from config.gin and written."""
  from experiments.core import config, train_eval
  from research.training.checkpoints.workdir import claim_workdir

  name = MODELS / "gguf_f32" / "model.gguf"
  read = config.read(
    "runs/quickstart.gin",
    [
      *("BATCH=2", "LENGTH=64", "EVAL_BATCHES=1", "EVAL_EVERY=2"),
      *("WARMUP=1", "STEPS=2", "experiment.Experiment.prompt=None"),
      "experiment.Experiment.transforms=()",
      "experiment.Experiment.trainable='.'",
      f"experiment.Pretrained.name='{name}'",
    ],
  )
  workdir = claim_workdir(tmp_path / "run", read.text)
  train_eval.train(read.experiment, workdir)
  # As if it had been ended before it wrote that: checkpoints are what there is.
  shutil.rmtree(workdir / "model")
  capsys.readouterr()
  status, result, errors = command(
    f"--from={workdir}", f"--to={tmp_path / 'hf'}", "--format=hf"
  )
  assert (status, errors) == (0, "")
  assert (result["changed"], result["tokenizer"]) == (0, True)
  before, after = load.load_model(name), load.load_model(tmp_path / "hf")
  assert train_eval.evaluate(read.experiment, workdir)["step"] == 2
  capsys.readouterr()
  moved = np.abs(
    np.asarray(after.params["embed"]) - np.asarray(before.params["embed"])
  )
  assert 1e-5 < moved.max() < 1e-2
  status, result, errors = command(
    f"--from={workdir}", f"--to={tmp_path / 'x.gguf'}", "--format=gguf:Q8_0"
  )
  assert (status, errors, result["tokenizer"]) == (0, "", True)
