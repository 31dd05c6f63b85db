"""Models from scratch: their weights, a whole run, and what it leaves."""

import dataclasses
import json
import math
import sys

import chex
import jax
import numpy as np
import pytest

from experiments import convert
from experiments.core import (
  artifacts,
  baselines,
  cli,
  config,
  data_fingerprint,
  train_eval,
)
from experiments.core.from_scratch import FromScratch
from research import sharding, tree
from research.data import baselines as lengths
from research.data import bpe, predicted
from research.data.sources import stdlib
from research.generation import perplexity
from research.interop import load
from research.nn import presets
from research.text.special_tokens import SpecialTokens
from research.training.checkpoints.workdir import claim_workdir
from research.training.objectives.preference import DPO
from research.typing import UserError

SIZES = presets.Sizes(
  vocab=400, width=32, depth=2, heads=4, kv_heads=2, hidden=48, head_dim=8
)
DOCUMENTS = stdlib.Stdlib("train", limit=3)
SMALL = [
  *("STEPS=30", "BATCH=2", "LENGTH=64", "DOCUMENTS=3", "WARMUP=2"),
  *("VOCAB=400", "WIDTH=64", "DEPTH=2", "HEADS=1", "HIDDEN=96"),
  *("stdlib.Stdlib.size=4000", "experiment.Experiment.prompt=None"),
]


@pytest.fixture(scope="module")
def fresh():
  tokenizer = bpe.Bpe(documents=DOCUMENTS, size=400)
  return FromScratch(sizes=SIZES, tokenizer=tokenizer)


def test_weights_are_a_function_of_the_seed(fresh):
  first, again = fresh.load(), fresh.load()
  chex.assert_trees_all_equal(first.params, again.params)
  other = dataclasses.replace(fresh, seed=1).load()
  assert not np.array_equal(first.params["embed"], other.params["embed"])
  assert first.model.vocab_size == 400 == first.tokenizer.vocab_size
  assert first.source["format"] == "fresh"


@pytest.mark.slow
def test_weights_do_not_depend_on_the_mesh(fresh):
  layout = sharding.Layout(data=2, fsdp=2, tensor=2)
  mesh = layout.mesh()
  placed = fresh.load(lambda x: layout.shardings(x, mesh))
  chex.assert_trees_all_equal(fresh.load().params, placed.params)
  up = placed.params["run0"]["layer0"]["mlp"]["up"]
  assert len(up.sharding.device_set) == 8


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mixtral"])
@pytest.mark.sample(3)
def test_any_family(family):
  model = FromScratch(sizes=SIZES, family=family).load()
  assert model.tokenizer is None
  tokens = np.arange(12)[None]
  hidden, _ = jax.jit(model.model.apply)({"params": model.params}, tokens)
  assert np.isfinite(hidden).all()


def test_what_does_not_fit(fresh):
  with pytest.raises(UserError, match="at least the tokenizer's 400"):
    dataclasses.replace(
      fresh, sizes=dataclasses.replace(SIZES, vocab=399)
    ).load()
  with pytest.raises(UserError, match="'lama', expected llama"):
    FromScratch(sizes=SIZES, family="lama")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run") / "tiny"
  return workdir, _run(workdir)


def _run(workdir, *bindings):
  read = config.read("runs/pretrain_tiny.gin", [*SMALL, *bindings])
  folder = claim_workdir(workdir, read.text)
  return train_eval.train(read.experiment, folder)


def _experiment(workdir):
  return config.read(str(workdir / "config.gin")).experiment


def test_the_shipped_model_has_five_million_that_can_be_quantized():
  experiment = config.read("runs/pretrain_tiny.gin").experiment
  model = presets.transformer(presets.FAMILIES["llama"], experiment.model.sizes)
  tokens = np.zeros((1, 2), np.int32)
  found = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
  assert 5e6 < tree.count(found) < 20e6
  # Rows of matrices are cut into blocks of up to 256 by quantized formats.
  for path, x in tree.flatten_paths(found):
    if not path.endswith("scale"):
      assert x.shape[-1] % 256 == x.shape[-2] % 256 == 0, path


def test_a_run_that_is_made_longer_is_not_finished(tmp_path):
  (tmp_path / "checkpoints" / "4").mkdir(parents=True)
  (tmp_path / "result.json").write_text('{"steps": 4}')
  experiment = config.read("runs/pretrain_tiny.gin").experiment
  for steps, finished in (3, True), (4, True), (5, False):
    plan = dataclasses.replace(experiment.plan, steps=steps)
    run = dataclasses.replace(experiment, plan=plan)
    assert (train_eval.finished_result(run, tmp_path) is not None) == finished


@pytest.mark.slow
def test_bits_per_byte_are_the_heldout_texts(finished):
  workdir, result = finished
  assert result["perplexity_after"] < 0.8 * result["perplexity_before"]
  experiment = _experiment(workdir)
  tokenizer = load.load_model(workdir).tokenizer
  source = experiment.heldout.source
  texts = [source[i] for i in range(len(source))]
  size = sum(len(text.encode()) for text in texts)
  tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
  bits = math.log2(result["perplexity_after"]) * tokens
  assert result["bits_per_byte"] == pytest.approx(bits / size, rel=1e-6)
  kept = json.loads((workdir / "result.json").read_text())
  assert kept["bits_per_byte"] == result["bits_per_byte"]
  assert kept["texts"] == data_fingerprint.hashes(experiment)
  # As configured: documents alone, since rows may begin anywhere in one.
  end = ["<|endoftext|>"]
  assert kept["special_tokens"] == dict(begin=end, end=end, every_row=False)
  assert tokenizer.special == SpecialTokens((0,), (0,), False)


@pytest.mark.slow
def test_bits_per_byte_need_all_of_the_text_and_a_loss_of_tokens(finished):
  workdir, _ = finished
  experiment = _experiment(workdir)
  tokenizer = load.load_model(workdir).tokenizer
  found = {"loss": 1.0, "weight": 7.0}
  assert data_fingerprint.bits_per_byte(experiment, tokenizer, found) is None
  assert data_fingerprint.bits_per_byte(experiment, tokenizer, None) is None
  of = predicted.count_predicted(experiment.heldout, tokenizer)
  whole = found | {"weight": of.tokens}
  assert data_fingerprint.bits_per_byte(experiment, tokenizer, whole) > 0
  other = dataclasses.replace(experiment, objective=DPO())
  assert data_fingerprint.bits_per_byte(other, tokenizer, whole) is None


def test_the_run_is_a_model_with_its_tokenizer(finished):
  workdir, _ = finished
  loaded = load.load_model(workdir)
  experiment = _experiment(workdir)
  made = experiment.model.load()
  text = "import json\n\nclass A:\n  pass  # π\n"
  assert loaded.tokenizer.encode(text) == made.tokenizer.encode(text)
  assert loaded.tokenizer.encode("x", add_special=True)[0] == 0
  assert loaded.tokenizer.stop == (0,)
  assert tree.count(loaded.params) == tree.count(made.params)
  found = perplexity.perplexity(
    loaded.model, loaded.params, loaded.tokenizer.encode(text * 40), 64, 2
  )
  assert math.isfinite(found.perplexity)
  last = train_eval.evaluate(experiment, workdir)
  assert last["heldout/perplexity"] == pytest.approx(
    finished[1]["perplexity_after"], rel=1e-6
  )
  assert last["bits_per_byte"] == pytest.approx(
    finished[1]["bits_per_byte"], rel=1e-6
  )


@pytest.mark.slow
def test_adapters_over_the_run_name_the_model_in_it(finished, tmp_path):
  """So that PEFT finds a model there, which a run's directory is not."""
  workdir, _ = finished
  read = config.read(
    "runs/quickstart.gin",
    [
      *("STEPS=1", "BATCH=2", "LENGTH=64", "EVAL_BATCHES=1", "WARMUP=0"),
      f"experiment.Pretrained.name={str(workdir)!r}",
      "experiment.Experiment.prompt=None",
    ],
  )
  folder = claim_workdir(tmp_path / "adapted", read.text)
  train_eval.train(read.experiment, folder)
  note = json.loads((folder / "adapter" / "adapter_config.json").read_text())
  assert note["base_model_name_or_path"] == str(workdir / "model")
  before, after = load.load_model(workdir), load.load_model(folder)
  assert tree.count(after.params) > tree.count(before.params)


@pytest.mark.slow
def test_a_mesh_trains_the_same_model(finished, tmp_path):
  """Weights, momentum and vocabulary cut over devices; the run is the same."""
  result = _run(tmp_path / "mesh", "FSDP=2", "TENSOR=2")
  assert result["devices"] == 4
  # Thirty updates whose sums were taken in another order, float32.
  assert result["bits_per_byte"] == pytest.approx(
    finished[1]["bits_per_byte"], rel=1e-4
  )


def test_what_to_try_next_fits_the_context(finished):
  workdir, _ = finished
  said = artifacts.next_commands(workdir, load.load_model(workdir), 8)
  assert "--text=README.md --window=64\n" in said
  assert said.endswith(f"evaluate --workdir={workdir} --devices=8")
  assert "--devices" not in artifacts.next_commands(workdir, None, 1)


@pytest.mark.parametrize("kind", ["hf", "gguf:F32", "orbax"])
def test_the_run_converts_to_any_format(kind, finished, tmp_path, capsys):
  workdir, _ = finished
  to = tmp_path / ("x.gguf" if kind.startswith("gguf") else "x")
  command = ["convert", f"--from={workdir}", f"--to={to}", f"--format={kind}"]
  assert cli.call(convert.main, command) == 0
  result = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert (result["changed"], result["tokenizer"]) == (0, True)
  mine, theirs = load.load_model(workdir), load.load_model(to)
  chex.assert_trees_all_equal(mine.params, theirs.params)
  assert mine.tokenizer.encode("def f(x):") == theirs.tokenizer.encode(
    "def f(x):"
  )


def test_other_texts_are_refused(finished, monkeypatch):
  workdir, _ = finished
  note = json.loads((workdir / "corpus.json").read_text())
  assert note["python"] == sys.version.split()[0]
  real = stdlib._corpus()
  changed = {name: text + "\n# changed\n" for name, text in real.items()}
  monkeypatch.setattr(stdlib, "_corpus", lambda: changed)
  with pytest.raises(UserError, match="have changed since"):
    data_fingerprint.claim(_experiment(workdir), workdir)


def test_a_damaged_note_is_said(finished, tmp_path):
  experiment = _experiment(finished[0])
  (tmp_path / "corpus.json").write_text('{"data": 1}')
  (tmp_path / "checkpoints" / "1").mkdir(parents=True)
  with pytest.raises(UserError, match="cannot be read as a run's data"):
    data_fingerprint.claim(experiment, tmp_path)


def test_baselines_read_the_same_texts(finished, capsys):
  workdir, _ = finished
  command = ["baselines", f"--config={workdir / 'config.gin'}", "--order=4"]
  assert cli.call(baselines.main, command) == 0
  result = json.loads(capsys.readouterr().out.splitlines()[-1])
  experiment = _experiment(workdir)
  text, known = (
    "".join(d.source[i] for i in range(len(d.source))).encode()
    for d in (experiment.heldout, experiment.data)
  )
  assert result["ngram"] == lengths.ngram(text, known, 4)
  assert result["xz_after_training"] < result["xz"]
  assert result["documents"] == len(experiment.heldout.source)
  assert result["exact"] == 0 <= result["known"] < result["documents"]


def test_baselines_say_what_of_the_test_is_known(tmp_path, capsys):
  words = [f"w{i}" for i in range(60)]
  files = {
    "a": words[:40],
    "b": words[10:30],
    "c": words[::-1],
    "d": words[40:],
  }
  for name, text in files.items():
    (tmp_path / name).write_text(" ".join(text))
  lines = [
    "from __gin__ import dynamic_registration",
    "include 'runs/pretrain_tiny.gin'",
    "from research.data import pipeline",
    "from research.data import sources",
    "train/pipeline.Pipeline.source = @t/sources.TextFiles()",
    "heldout/pipeline.Pipeline.source = @h/sources.TextFiles()",
    f"t/sources.TextFiles.paths = ({str(tmp_path / 'a')!r},)",
    "h/sources.TextFiles.paths = (",
    *(f"  {str(tmp_path / name)!r}," for name in "abcd"),
    ")",
  ]
  (tmp_path / "x.gin").write_text("\n".join(lines))
  command = ["baselines", f"--config={tmp_path / 'x.gin'}", "--order=2"]
  assert cli.call(baselines.main, command) == 0
  result = json.loads(capsys.readouterr().out.splitlines()[-1])
  # The same, a part of it, its words turned around, and others.
  assert (result["documents"], result["exact"], result["known"]) == (4, 1, 2)
  size = {name: len(" ".join(text)) for name, text in files.items()}
  share = (size["a"] + size["b"]) / sum(size.values())
  assert result["known_share"] == pytest.approx(share)


def test_baselines_refuse_what_they_cannot_read(finished, capsys):
  workdir, _ = finished
  command = ["baselines", f"--config={workdir / 'config.gin'}", "--order=4"]
  assert cli.call(baselines.main, [*command, "--order=9"]) == 1
  config_of_chat = "--config=runs/foundation/chat_sft.gin"
  assert cli.call(baselines.main, ["baselines", config_of_chat]) == 1
  assert "expected documents of text" in capsys.readouterr().err
