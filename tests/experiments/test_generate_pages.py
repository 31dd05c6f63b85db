"""Several prompts over one pool of pages, from the command line."""

import json
import pathlib

import pytest

from experiments import cli, generate

MODELS = pathlib.Path(__file__).parents[1] / "golden" / "models"
TINY = MODELS / "gguf_f32" / "model.gguf"
PROMPTS = [f"--prompt={x}" for x in ("the cat", "a", "the cat ran", "def f")]


@pytest.fixture
def command(capsys):
  """Runs generate in this process: (status, stdout lines, stderr)."""

  def call(*arguments):
    arguments = [f"--model={TINY}", "--max_new_tokens=12", *arguments]
    status = cli.call(generate.main, ["command", *map(str, arguments)])
    out = capsys.readouterr()
    return status, out.out.splitlines(), out.err

  return call


def told(done):
  status, lines, errors = done
  assert (status, errors) == (0, "")
  return json.loads(lines[-1])


@pytest.mark.parametrize("pages", ["4", "4,rows=2", "16,rows=1"])
def test_the_text_is_that_without_pages(command, pages):
  rules = "--temperature=1.2", "--seed=3"
  want = told(command(*PROMPTS, *rules))
  got = told(command(*PROMPTS, *rules, f"--pages={pages}"))
  for a, b in zip(got["rows"], want["rows"], strict=True):
    assert a == b
  assert "pages" not in want
  assert 0 < got["pages"]["most_pages"] <= got["pages"]["pages"]
  assert got["pages"]["most_bytes"] < got["pages"]["slab_bytes"]


def test_one_prompt_streams(command):
  want = told(command(PROMPTS[0]))
  got = told(command(PROMPTS[0], "--pages=8"))
  assert got["text"] == want["text"]


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (["--pages=4", "--kv=int8"], "--kv=int8: is not for --pages"),
    (["--pages=x"], "pages=x: found 'x' as size"),
    (["--pages=4,count=2"], "pages: found 2 for a row"),
    (["--pages=4", "--adapter=a=A", "--adapter=b=B"], "found 2 adapters"),
    (["--pages=4", "--sampler=diffusion"], "--pages: is not for"),
  ],
  ids=str,
)
def test_errors(command, flags, words):
  status, lines, errors = command(*PROMPTS[:2], *flags)
  assert (status, lines) == (1, [])
  assert errors.startswith("error: ") and words in errors
  assert len(errors.splitlines()) <= 3
