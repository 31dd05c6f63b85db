"""Prompts of files, of standard input, and of a conversation."""

import io
import json

import pytest

from experiments.generating import conversation, prompts
from research.typing import UserError
from tests.experiments import generated
from tests.experiments.generated import told


@pytest.fixture
def command(capsys):
  return generated.of_tiny(capsys)


@pytest.fixture
def stdin(monkeypatch):
  """Sets standard input to a text, in a terminal or not."""

  def use(text, terminal=False):
    stream = io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8")
    stream.isatty = lambda: terminal
    monkeypatch.setattr("sys.stdin", stream)

  return use


def test_files_are_prompts_but_for_the_line_break_that_ends_them(
  tmp_path, stdin
):
  file = tmp_path / "a.txt"
  file.write_text("two\n lines\n\n")
  stdin("typed\n")
  found = prompts.read(["one"], [str(file), "-"])
  assert found == ["one", "two\n lines\n", "typed"]
  stdin(" ")
  with pytest.raises(UserError, match="--prompt_file=-: is empty"):
    prompts.read([], ["-"])
  with pytest.raises(UserError, match="found twice"):
    prompts.read([], ["-", "-"])


@pytest.mark.slow
def test_answers_stand_under_their_prompts(command, tmp_path):
  file = tmp_path / "a.txt"
  file.write_text("a dog ran\n")
  done = command("--prompt=the cat", f"--prompt_file={file}")
  rows = told(done)["rows"]
  assert [row["prompt"] for row in rows] == ["the cat", "a dog ran"]
  shown = "\n".join(done[1][:-1])
  assert shown == (
    f"--- prompt 1: the cat\n{rows[0]['text']}\n\n"
    f"--- prompt 2: a dog ran\n{rows[1]['text']}\n"
  )


def test_a_long_prompt_is_shortened_above_its_answer():
  row = dict(prompt="word \n" * 50, text="end", adapter="mine")
  head, text = prompts.answer(3, row).rstrip("\n").split("\n")
  assert head.startswith("--- prompt 3 [mine]: word word")
  assert head.endswith(" ...") and len(head) < 80 and text == "end"
  assert prompts.answer(1, dict(prompt="", text="end")) == "--- text 1\nend\n"


SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
CAT = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
def test_a_conversation_in_the_terminal(command, stdin):
  """Each answer is to all before it; the first is that to a prompt."""
  chat = "--chat", "--system=Be brief."
  # The prompt is the template's text, written out here.
  want = told(command(f"--prompt={SYSTEM}{CAT}"))
  stdin("the cat\n\nand then\n", terminal=True)
  status, lines, errors = command(*chat)
  got = json.loads(lines[-1])
  assert status == 0 and "Ctrl-D" in errors
  assert got["turns"] == 2
  roles = [message["role"] for message in got["messages"]]
  assert roles == ["system", "user", "assistant", "user", "assistant"]
  assert got["messages"][2]["content"] == want["text"]
  # Without a terminal nobody answers.
  stdin("the cat\n")
  status, _, errors = command(*chat)
  assert status == 1 and "--prompt: is missing" in errors


def test_what_each_answer_is_to(stdin, capsys):
  asked = []

  def answer(messages, turn):
    asked.append((turn, [message["content"] for message in messages]))
    if messages[-1]["content"] == "too long":
      raise UserError("context is full")
    return dict(text=f"answer {turn}", tokens=3)

  stdin("a\ntoo long\nb\n/new\nc\n", terminal=True)
  got = conversation.converse(answer, "s")
  assert asked == [
    (0, ["s", "a"]),
    (1, ["s", "a", "answer 0", "too long"]),
    (1, ["s", "a", "answer 0", "b"]),
    (2, ["s", "c"]),
  ]
  assert (got["turns"], got["tokens"]) == (3, 9)
  assert [m["content"] for m in got["messages"]] == ["s", "c", "answer 2"]
  assert "context is full\n/new starts another" in capsys.readouterr().err
