"""Special tokens through a run: said, kept, and read by what comes after."""

import dataclasses
import json

import pytest

from experiments import perplexity
from experiments.core import cli, config, data_fingerprint, train_eval
from research.data.pipeline import Mixture
from research.interop import load
from research.text.special_tokens import NO_SPECIAL_TOKENS, SpecialTokens
from research.training.checkpoints.workdir import claim_workdir
from tests.experiments.core import test_from_scratch

AUTO = ["pipeline.Pipeline.begin='auto'", "pipeline.Pipeline.end=None"]
BOS = SpecialTokens((0,), (), True)


def read(*bindings):
  bindings = [*test_from_scratch.SMALL, "STEPS=3", *AUTO, *bindings]
  return config.read("runs/pretrain_tiny.gin", bindings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  experiment, text = read()
  workdir = claim_workdir(tmp_path_factory.mktemp("run") / "tiny", text)
  return experiment, workdir, train_eval.train(experiment, workdir)


@pytest.mark.slow
def test_a_run_reads_as_its_tokenizer_says_and_says_so(finished):
  experiment, workdir, result = finished
  found = dict(begin=["<|endoftext|>"], end=[], every_row=True)
  assert result["special_tokens"] == found
  kept = json.loads((workdir / "result.json").read_text())
  assert kept["special_tokens"] == found
  words = load.load_model(workdir).tokenizer
  assert words.special == BOS
  batch = next(iter(experiment.data.training(words)))
  assert (batch["tokens"][batch["positions"] == 0] == 0).all()
  again = train_eval.evaluate(experiment, workdir)
  assert again["special_tokens"] == found
  assert again["heldout/perplexity"] == pytest.approx(
    result["perplexity_after"], rel=1e-6
  )


def test_what_a_run_began_with_stays(finished, tmp_path, capsys):
  """Whatever the tokenizer says later, or said before there were records."""
  experiment, workdir, _ = finished
  words = experiment.model.load().tokenizer
  assert words.special == BOS
  begun = tmp_path / "begun"
  begun.mkdir()

  def found(data=experiment, **more):
    return data_fingerprint.restore_tokenizer(
      data, words, begun, **more
    ).special

  assert found() == BOS  # nothing was trained yet
  (begun / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
  assert found() == NO_SPECIAL_TOKENS
  assert "started without the special tokens" in str(capsys.readouterr())
  explicit = read("pipeline.Pipeline.begin=0").experiment
  assert found(explicit) == SpecialTokens((0,), (), False)
  assert found(keep=True) == NO_SPECIAL_TOKENS
  assert found(explicit) == NO_SPECIAL_TOKENS  # by its record
  record = (workdir / "special_tokens.json").read_text()
  (begun / "special_tokens.json").write_text(record)
  assert found() == BOS
  assert data_fingerprint.restore_tokenizer(experiment, None, begun) is None


def test_texts_beyond_the_context_are_warned_of(finished, capsys):
  """Whatever the length of a row, if documents share it."""
  experiment, workdir, _ = finished
  loaded = load.load_model(workdir)
  short = loaded.model.clone(max_positions=60)

  def warned(model, **changes):
    data = dataclasses.replace(experiment.data, **changes)
    changed = dataclasses.replace(experiment, data=data, heldout=None)
    data_fingerprint.check_context(changed, model, loaded.tokenizer)
    return capsys.readouterr().err

  assert warned(loaded.model) == ""
  said = warned(short)
  assert "of data and validation have texts of up to 64 tokens" in said
  assert "context is 60" in said and "Set LENGTH=60, or less." in said
  experiment = dataclasses.replace(experiment, validation=None)
  assert warned(short, source=Short()) == ""
  assert "texts of up to 64" in warned(short, source=Short(90))
  mixed = Mixture(parts=(experiment.data,), weights=(1,))
  changed = dataclasses.replace(experiment, data=mixed, heldout=None)
  data_fingerprint.check_context(changed, short, loaded.tokenizer)
  assert "rows of data have texts of up to 64" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class Short:
  """Documents of few tokens."""

  size: int = 9

  def __len__(self):
    return 5

  def __getitem__(self, index):
    return "abcdefghijklm"[index : index + 2] * self.size


@pytest.mark.parametrize("bos", [None, "never", "auto", "always"])
def test_perplexity_says_what_it_leaves_out(finished, tmp_path, capsys, bos):
  _, workdir, _ = finished
  text = tmp_path / "text"
  text.write_text("import json\n\nclass A:\n  pass\n" * 40)
  words = ["perplexity", f"--model={workdir}", f"--text={text}", "--window=60"]
  words += [f"--bos={bos}"] * (bos is not None)
  assert cli.call(perplexity.main, words) == 0
  out = capsys.readouterr()
  result = json.loads(out.out.splitlines()[-1])
  assert result["bos"] == (bos or "never")
  notes = [n for n in out.err.splitlines() if n.startswith("warning: ")]
  assert len(notes) == (bos is None)
  assert all("expects <|endoftext|> first" in n for n in notes)
  loaded = load.load_model(workdir)
  want = perplexity_of(loaded, text, (0,) * (bos in ("auto", "always")))
  assert result["perplexity"] == pytest.approx(want.perplexity, rel=1e-6)
  assert result["tokens"] == want.tokens


def perplexity_of(loaded, text, begin):
  from research.generation.perplexity import perplexity

  ids = loaded.tokenizer.encode(text.read_text())
  return perplexity(loaded.model, loaded.params, ids, 60, begin=begin)
