"""The commands: results as JSON, errors of one to three lines, exit status."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import (
  convert,
  evaluate,
  generate,
  imatrix,
  label,
  perplexity,
  plan,
  quantize,
  search,
  study,
  sweep,
  train,
)
from experiments.core import artifacts, cli, config, runtime, train_eval
from research import progress, tree
from research.interop import load, peft
from research.lora import adapt
from research.lora.methods.lora import LoRA
from research.training.preemption import Preempted
from research.typing import UserError
from tests import support_output

ROOT = pathlib.Path(__file__).resolve().parents[3]
MODELS = ROOT / "tests" / "golden" / "models"
FLAGS = cli.new_flags()  # of the commands defined below
TINY = str(MODELS / "gguf_f32" / "model.gguf")


@pytest.fixture
def command(capsys):
  """Calls a command in this process: `(status, stdout lines, stderr)`."""

  def call(main, *arguments):
    status = cli.call(main, ["command", *map(str, arguments)])
    out = capsys.readouterr()
    return status, out.out.splitlines(), support_output.errors(out.err)

  return call


def test_generate_streams_and_ends_with_json(command):
  arguments = [f"--model={TINY}", "--prompt=the cat", "--max_new_tokens=20"]
  status, lines, errors = command(generate.main, *arguments)
  assert (status, errors) == (0, "")
  result = json.loads(lines[-1])
  assert result["text"] == "\n".join(lines[:-1])
  assert result["finish_reason"] in ("stop", "length")
  assert 1 <= result["tokens"] <= 20
  again = json.loads(command(generate.main, *arguments)[1][-1])
  assert again["text"] == result["text"]
  # A stop string cuts the same text.
  stop = result["text"][3:5]
  cut = json.loads(command(generate.main, *arguments, f"--stop={stop}")[1][-1])
  assert cut["text"] == result["text"].split(stop)[0]
  assert cut["finish_reason"] == "stop"


@pytest.mark.slow
def test_an_adapter_is_applied(command, tmp_path):
  """By --adapter over its base, or as a model that names its base."""
  base = load.load_model(TINY)
  adapted = adapt.Adapt(method=LoRA(rank=2))(base.params, jax.random.key(0))
  adapted = tree.map_paths(
    lambda path, x: jnp.ones_like(x) if path.endswith("/b") else x, adapted
  )
  peft.save_adapter(tmp_path, adapted, base.model, TINY)
  arguments = ["--prompt=the cat", "--max_new_tokens=20"]
  with_it = f"--model={TINY}", f"--adapter=mine={tmp_path}"
  named = command(generate.main, *arguments, *with_it)
  alone = command(generate.main, *arguments, f"--model={tmp_path}")
  plain = command(generate.main, *arguments, f"--model={TINY}")
  assert [status for status, _, _ in (named, alone, plain)] == [0, 0, 0]
  assert named[1][:-1] == alone[1][:-1] != plain[1][:-1]


@pytest.mark.slow
def test_a_seed_is_a_sample(command):
  arguments = [f"--model={TINY}", "--prompt=a", "--temperature=1.5"]
  texts = [
    command(generate.main, *arguments, f"--seed={seed}")[1][:-1]
    for seed in (1, 1, 2)
  ]
  assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "--model: is missing"),
    (["--model=nowhere", "--prompt=a"], "nowhere"),
    ([f"--model={TINY}"], "--prompt: is missing"),
    (["--temperature=0", "--top_k=3"], "--top_k: has no effect"),
    (["--seed=3"], "--seed: has no effect at --temperature=0"),
    (["--temperature=-1"], "--temperature=-1: expected a number above 0, or 0"),
    (["--max_new_tokens=-1", "--model=nowhere"], "max_new_tokens: found -1"),
    (["--prompt_file=nowhere.txt"], "--prompt_file=nowhere.txt: No such file"),
    (["--system=Be brief."], "--system: is for --chat"),
    (["--top_p=2"], "top_p: found 2"),
    (["--max_new_tokens=0"], "max_new_tokens: found 0"),
    (["--stop="], "--stop: found an empty string"),
    (["--sampler=diffusion"], "--sampler=diffusion"),
    (["--sampler=diffusion", "--seed=3"], "--seed: has no effect at"),
    (["--adapter=somewhere"], "expected NAME=DIR"),
    (["--adapter=mine=nowhere"], "nowhere"),
    (["--prompt=" + "word " * 5000], "context"),
  ],
  ids=str,
)
def test_generate_errors(command, arguments, words):
  if arguments and not arguments[0].startswith("--model"):
    arguments = [f"--model={TINY}", "--prompt=a", *arguments]
  status, lines, errors = command(generate.main, *arguments)
  assert (status, lines) == (1, [])
  assert errors.startswith("error: ") and words in errors
  assert "Traceback" not in errors
  assert len(errors.splitlines()) <= 3


@pytest.mark.parametrize(
  "arguments",
  [
    ["--nonesuch=1"],
    ["--seed=x"],
    ["--sampler=magic"],
    ["--dtype=float12"],
    ["stray"],
  ],
  ids=str,
)
def test_wrong_command_lines(command, arguments):
  status, lines, errors = command(generate.main, *arguments)
  assert (status, lines) == (2, [])
  assert len(errors.splitlines()) == 1
  assert arguments[0].strip("-").split("=")[0] in errors


def test_perplexity_is_the_standard(command, tmp_path):
  text = tmp_path / "text.txt"
  text.write_text("the cat sat on the mat and the dog ran " * 20)
  status, lines, errors = command(
    perplexity.main, f"--model={TINY}", f"--text={text}", "--window=16"
  )
  assert (status, errors) == (0, "")
  result = json.loads(lines[-1])
  assert {"perplexity", "tokens", "tokens_per_s"} <= set(result)
  assert result["tokens"] == 8 * 15
  np.testing.assert_allclose(result["perplexity"], np.exp(result["nll"]))


@pytest.mark.parametrize(
  "content, words",
  [
    (None, "No such file"),
    (b"", "is empty"),
    (b" \n", "is empty"),
    (b"abc\xff", "not UTF-8 at byte 3"),
    ("abc".encode("utf-16"), "iconv -f UTF-16 -t UTF-8"),
    (b"a", "found 1 tokens, expected at least 2"),
  ],
)
def test_bad_texts(command, tmp_path, content, words):
  text = tmp_path / "text.txt"
  if content is not None:
    text.write_bytes(content)
  status, lines, errors = command(
    perplexity.main, f"--model={TINY}", f"--text={text}", "--window=64"
  )
  assert (status, lines) == (1, [])
  assert words in errors and len(errors.splitlines()) <= 3


VLM = "--preset=smolvlm-256m"
SIZE = "--image_size=48x64"
RUN = ["--config=runs/quickstart.gin", "--topology=cpu:2"]
SWEEP = ["--sweep=sweeps/quickstart_rank.gin"]


@pytest.mark.parametrize(
  "module, arguments, words",
  [
    (plan, [VLM, SIZE, RUN[1]], "--topology: has no effect with --preset"),
    (plan, [*RUN, SIZE], "--image_size: has no effect without --preset"),
    (plan, [*RUN, "--compiles=2"], "--compiles: has no effect without --adv"),
    (plan, [*RUN, "--hlo=a", "--advise"], "--hlo: has no effect with --advise"),
    (sweep, [*SWEEP, "--image=a"], "--image: has no effect with --launcher=lo"),
    (sweep, [*SWEEP, "--sbatch=a"], "--sbatch: has no effect with --launcher"),
    (
      sweep,
      [*SWEEP, "--launcher=slurm", "--parallel=2"],
      "--parallel: has no effect with --launcher=slurm",
    ),
  ],
)
def test_flags_without_effect_are_refused(command, module, arguments, words):
  status, lines, errors = command(module.main, *arguments)
  assert (status, lines) == (1, []) and words in errors


def test_sampling_is_checked_before_a_model_is_loaded(
  command, tmp_path, monkeypatch
):
  monkeypatch.setattr(load, "load_model", lambda *_: pytest.fail("loaded"))
  flags = "--config=runs/search/chain_sum_smollm2.gin", "--set=TEMPERATURE=-1"
  status, _, errors = command(search.main, f"--workdir={tmp_path}", *flags)
  assert status == 1 and "temperature: found -1, expected" in errors


def test_a_report_that_cannot_be_written_is_said_first(command, tmp_path):
  (tmp_path / "file").write_text("mine")
  flags = f"--from={TINY}", f"--to={tmp_path / 'new'}", "--format=hf"
  report = f"--report={tmp_path / 'file' / 'report.json'}"
  status, lines, errors = command(convert.main, *flags, report)
  assert (status, lines) == (1, []) and "is a file, expected a dir" in errors
  assert not (tmp_path / "new").exists()


def test_a_byte_order_mark_is_no_text(tmp_path):
  text = tmp_path / "text.txt"
  text.write_bytes(b"\xef\xbb\xbfabc\r\n")
  assert cli.read_text(str(text), "text") == "abc\r\n"


def test_a_directory_is_no_text(command, tmp_path):
  status, _, errors = command(
    perplexity.main, f"--model={TINY}", f"--text={tmp_path}"
  )
  assert status == 1 and "directory" in errors


@pytest.mark.parametrize(
  "module, own",
  [
    (generate, "model"),
    (perplexity, "model"),
    (train, "config"),
    (evaluate, "workdir"),
  ],
  ids=lambda x: getattr(x, "__name__", x),
)
def test_help_names_every_flag(command, module, own):
  status, lines, _ = command(module.main, "--help")
  text = "\n".join(lines)
  assert status == 0
  assert lines[0].endswith(".") and "python -m experiments." in text
  for name in (own, *module.FLAGS):
    assert f"--{name}" in text or f"--[no]{name}" in text
  assert command(module.main, "--help")[1] == lines  # a second time as well


@pytest.mark.parametrize(
  "arguments, words",
  [
    ([], "expected --workdir=DIR of a run, --config=FILE"),
    (["--workdir=nowhere"], "--workdir=nowhere: found no config.gin"),
    (["--config=nowhere.gin"], "--config=nowhere.gin: no such file"),
    (["--config=a.gin", "--step=3"], "--step: has no effect without --workdir"),
    (["--workdir=a", "--text=b"], "--text: has no effect without --base"),
    (["--workdir=a", "--nolayers"], "--layers: has no effect without --base"),
    (["--base=a", "--model=b", "--workdir=c"], "--workdir: has no effect with"),
    (["--base=a", "--model=b", "--devices=2"], "--devices: has no effect with"),
    (
      ["--base=a", "--model=b", "--set=C=3"],
      "--set: has no effect with --base",
    ),
  ],
  ids=str,
)
def test_evaluate_errors(command, arguments, words):
  status, lines, errors = command(evaluate.main, *arguments)
  assert (status, lines) == (1, [])
  assert words in errors and len(errors.splitlines()) <= 3


@pytest.mark.parametrize(
  "module, flag, more",
  [
    (train, "workdir", ["--config=runs/quickstart.gin"]),
    (evaluate, "workdir", []),
    (search, "workdir", ["--config=runs/search/additions_search.gin"]),
    (study, "workdir", ["--config=runs/lora/claims_width.gin"]),
    (sweep, "workdir", ["--sweep=sweeps/quickstart_rank.gin"]),
    (label, "to", ["--config=runs/prm/countdown_labels.gin"]),
    (quantize, "to", ["--config=runs/quant/nf4_smollm2.gin"]),
    (convert, "to", [f"--from={TINY}", "--format=hf"]),
    (imatrix, "to", [f"--model={TINY}"]),
  ],
  ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_file_is_no_directory(command, tmp_path, module, flag, more):
  """It is said before any work, which might be lost at its end."""
  (tmp_path / "file").write_text("mine")
  path = tmp_path / "file" / "new.jsonl"
  status, lines, errors = command(module.main, f"--{flag}={path}", *more)
  assert (status, lines) == (1, [])
  assert f"{path}: " in errors and f"{tmp_path / 'file'} is a file" in errors
  assert len(errors.splitlines()) <= 3
  assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
  "module, more",
  [
    (label, ["--config=runs/prm/countdown_labels.gin"]),
    (convert, [f"--from={TINY}", "--format=gguf:F32"]),
    (imatrix, [f"--model={TINY}"]),
  ],
  ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_directory_is_no_file(command, tmp_path, module, more):
  status, lines, errors = command(module.main, f"--to={tmp_path}", *more)
  assert (status, lines) == (1, [])
  assert f"{tmp_path}: is already there; expected a new name" in errors


def test_evaluate_takes_the_step_that_is_asked_for(
  command, monkeypatch, tmp_path
):
  read = config.read("runs/quickstart.gin", [])
  monkeypatch.chdir(tmp_path)
  (tmp_path / "here").mkdir()
  (tmp_path / "here" / "config.gin").write_text(read.text)
  monkeypatch.setattr(config, "read_workdir", lambda *_: read)

  def evaluated(experiment, workdir=None, number=None):
    return {"workdir": workdir.name, "step": number}

  monkeypatch.setattr(train_eval, "evaluate", evaluated)
  for flags, step in (["--step=3"], 3), ([], None):
    status, lines, errors = command(evaluate.main, "--workdir=here", *flags)
    assert status == 0, errors
    assert json.loads(lines[-1]) == {"workdir": "here", "step": step}


@pytest.mark.parametrize(
  "error, text",
  [
    (UserError("a: b"), "error: a: b\n"),
    (OSError(28, "No space left on device", "x"), "error: x: No space"),
    (KeyboardInterrupt(), "error: interrupted"),
    (MemoryError(), "error: out of memory: nothing is left\nUse smaller"),
    (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), "error: out of memory: RESOU"),
    (RuntimeError("ours"), "Traceback"),
    (ZeroDivisionError("ours"), "Traceback"),
  ],
)
def test_what_is_shown_of_an_error(command, error, text):
  def main(argv):
    raise error

  status, lines, errors = command(main)
  assert status != 0 and lines == []
  assert errors.startswith(text)


@pytest.mark.parametrize(
  ("error", "want"), [(UserError("a: b"), 1), (Preempted("a: b"), 42)]
)
def test_traceback_on_demand(command, error, want):
  """A launcher restarts a run that was preempted, with this flag, too."""

  def main(argv):
    raise error

  status, _, errors = command(main, "--traceback")
  assert status == want and "Traceback" in errors and "a: b" in errors


def test_long_work_says_so(monkeypatch, capsys):
  """Whatever a command does, in a process of its own; stdout has the result."""
  monkeypatch.setattr(progress, "FIRST", 0.01)
  monkeypatch.setattr(progress, "_POLL", 0.005)
  monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
  monkeypatch.setattr(sys, "argv", ["command"])

  def main(argv):
    with progress.phase("proving"):
      time.sleep(0.1)
    return {"a": 1}

  with pytest.raises(SystemExit) as ended:
    cli.run(main)
  out = capsys.readouterr()
  assert ended.value.code == 0 and out.out == '{"a": 1}\n'
  assert "proving: 0 s\n" in out.err


def test_results_are_json(command):
  def main(argv):
    return {"a": np.float32(1.5), "b": float("nan"), "c": [ROOT, (1, None)]}

  _, lines, _ = command(main)
  assert json.loads(lines[-1]) == {
    "a": 1.5,
    "b": None,
    "c": [str(ROOT), [1, None]],
  }


FULL = pathlib.Path("/dev/full")


@pytest.mark.skipif(
  not FULL.is_char_device(), reason="needs a device that is full"
)
def test_a_full_disk(tmp_path):
  # By a link: whatever is written to it, the device itself stays.
  link = tmp_path / "result.json"
  link.symlink_to(FULL)
  with pytest.raises(UserError, match="json: cannot be written .No space"):
    artifacts.write_text(link, "x")
  assert link.is_symlink()
  with FULL.open("w") as full:
    done = subprocess.run(
      [sys.executable, "-m", "experiments.generate", "--help"],
      cwd=ROOT,
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
      timeout=120,
    )
  assert done.returncode == 1
  assert done.stderr == "error: output: No space left on device\n"


def test_a_process_of_its_own():
  """The status reaches the shell, and help needs no JAX."""
  environ = os.environ | {"JAX_PLATFORMS": "nonesuch"}

  def run(*arguments):
    return subprocess.run(
      [sys.executable, "-m", "experiments.generate", *arguments],
      cwd=ROOT,
      env=environ,
      capture_output=True,
      text=True,
      timeout=120,
    )

  helped = run("--help")
  assert helped.returncode == 0 and "--temperature" in helped.stdout
  wrong = run("--prompt=a")
  assert wrong.returncode == 1 and wrong.stdout == ""
  assert wrong.stderr == "error: --model: is missing; see --help\n"


def _counts(argv):
  return {"count": 3, "rate": float("nan")}


def test_a_result_is_also_written_where_it_is_asked_for(command, tmp_path):
  path = tmp_path / "made" / "a.json"
  status, lines, _ = command(_counts, f"--result={path}")
  assert (status, json.loads(lines[-1])) == (0, {"count": 3, "rate": None})
  assert path.read_text() == lines[-1] + "\n"
  assert [x.name for x in path.parent.iterdir()] == ["a.json"]
  # A file in the place of its folder.
  status, lines, errors = command(_counts, f"--result={path}/b.json")
  assert status == 1 and "cannot be written" in errors and lines == []


def test_who_waits_for_other_processes_may_speak(monkeypatch):
  """JAX has a client by then; asking it for the index would start a backend."""
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax, "process_index", lambda: pytest.fail("asked"))
  monkeypatch.setattr(runtime, "CONNECTING", threading.Event())
  runtime.CONNECTING.set()
  assert cli._is_first_process()
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  runtime.CONNECTING.clear()
  assert not cli._is_first_process()


@pytest.mark.parametrize("index", [0, 1])
def test_what_is_loaded_is_named_beside_the_result(index, monkeypatch, capsys):
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax, "process_index", lambda: index)
  path = "a/" * 50
  cli.loading("m", path, f"Pretrained(name={path!r}, dtype='float32')")
  lines = ["m", path, f"Pretrained(name={path!r}, [...]"]
  said = "".join(f"loading {line}\n" for line in lines) if index == 0 else ""
  assert capsys.readouterr() == ("", said)
