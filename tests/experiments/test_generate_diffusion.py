"""Filling in masks from the command line: what it writes, shows and refuses."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import perplexity
from experiments.core import cli
from experiments.generating import prepared_rows, unmask_display
from research.diffusion.sampling import sampler, variable_length, visualize
from research.diffusion.sampling.config import Growth, SamplerConfig
from research.diffusion.sampling.denoiser import NoCache
from research.interop import load
from research.interop.diffusion.spec import Spec
from tests.experiments import filled
from tests.experiments.filled import LENGTH
from tests.experiments.generated import TINY, told


@pytest.fixture(scope="module")
def places(tmp_path_factory):
  root = tmp_path_factory.mktemp("models")
  return filled.converted(root)


@pytest.fixture
def command(capsys, places):
  return filled.command(capsys, places)


def test_what_is_converted_says_so(places):
  vocabulary = load.load_model(TINY).model.vocab_size
  for name, block in (("all", None), ("one", 1), ("four", 4)):
    loaded = load.load_model(places[name])
    end = loaded.tokenizer.stop
    want = Spec(mask_id=vocabulary, shift=True, block=block, end=end)
    assert loaded.diffusion == want
    assert loaded.model.vocab_size == vocabulary + 1
  assert load.load_model(TINY).diffusion is None


@pytest.mark.slow
def test_blocks_of_one_write_what_the_model_wrote(command):
  want = told(command(TINY, "--sampler=autoregressive"))
  for flags in ([], ["--cache=prefix"]):
    got = told(command("one", *flags))
    for field in ("text", "tokens", "finish_reason", "prompt_tokens"):
      assert got[field] == want[field]


@pytest.mark.slow
def test_calls_are_counted(command):
  assert told(command("all", "--block=8", "--steps=2"))["calls"] == 2
  got = told(command("all", "--block=4", "--steps=4", "--cache=dual"))
  assert got["calls"] <= 4 and got["tokens"] <= LENGTH
  assert got["tokens_per_call"] == got["tokens"] / got["calls"]
  assert got["tokens_per_s"] is None or got["tokens_per_s"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["vicinity:64", "delayed:1"])
@pytest.mark.sample(2)
def test_what_reads_everything_is_no_cache(command, cache):
  flags = "--block=4", "--policy=threshold:0.2"
  want = told(command("all", *flags))
  got = told(command("all", *flags, f"--cache={cache}"))
  assert got["text"] == want["text"]


@pytest.mark.slow
def test_a_delayed_cache_fills_everything(command):
  got = told(command("all", "--block=8", "--steps=8", "--cache=delayed"))
  assert got["calls"] <= 8 and got["tokens"] <= LENGTH


@pytest.mark.slow
def test_a_prompt_may_end_within_a_block(command):
  want = told(command("four"))
  assert told(command("four", "--cache=prefix"))["text"] == want["text"]
  assert want["prompt_tokens"] % 4 and want["tokens"] <= LENGTH


PROMPTS = "the dog", "the cat sat on the mat", "a"


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "flags"),
  [
    ("all", ["--block=4", "--temperature=1"]),
    ("four", ["--cache=prefix", "--temperature=1"]),
  ],
)
def test_several_prompts_are_one_batch_and_do_not_matter_to_each_other(
  command, name, flags
):
  """Of different lengths; each has the key of its place."""
  prompts = PROMPTS if name == "all" else PROMPTS[:2]
  given = [f"--prompt={p}" for p in prompts]
  whole = told(command(name, *flags, *given))
  rows = whole["rows"]
  assert [row["prompt"] for row in rows] == list(prompts)
  assert whole["tokens"] == sum(row["tokens"] for row in rows)
  if name == "all":
    # Others in the place of the first two; the third is what it was.
    other = ["--prompt=the cat", "--prompt=the mat", given[2]]
    again = told(command(name, *flags, *other))["rows"]
    assert again[2] == rows[2]
  alone = told(command(name, *flags, given[0]))
  assert {k: alone[k] for k in ("text", "tokens", "calls")} == {
    k: rows[0][k] for k in ("text", "tokens", "calls")
  }


@pytest.mark.parametrize(
  "flags",
  [
    ["--policy=credit:0.9", "--guidance=1", "--cache=dual"],
    ["--plan=dream", "--steps=3", "--select=entropy"],
    ["--policy=quota+threshold:0.9", "--steps=2", "--edit=1"],
    ["--plan=chance", "--select=random", "--steps=12", "--remask=rescale:0.5"],
  ],
  ids=" ".join,
)
@pytest.mark.sample(3, 1)
def test_ways_to_fill(command, flags):
  got = told(command("all", "--block=8", *flags))
  steps = [int(f.split("=")[1]) for f in flags if f.startswith("--steps")]
  # Edits look once more at what the last step filled.
  most = min(steps, default=LENGTH) + ("--edit=1" in flags)
  each = 2 if "--guidance=1" in flags else 1
  assert got["calls"] in range(each, each * most + 1, each)
  assert got["tokens"] <= LENGTH


@pytest.mark.slow
def test_ends(command):
  """Never: none. Last: whatever is none is filled before it."""
  flags = "--max_new_tokens=16", "--block=4", "--policy=threshold:0.5"
  base = told(command("all", *flags))
  assert (base["finish_reason"], base["tokens"] < 16) == ("stop", True)
  never = told(command("all", *flags, "--ends=never"))
  assert (never["finish_reason"], never["tokens"]) == ("length", 16)


def early(loaded, ends, ids, got, block, length):
  """Returns how many ends there are, and how many came before their turn.

  That is while another open place of the block proposed something else, asked
  again of the row as it stood, without padding, one call after another.
  """
  how = loaded.diffusion
  asked = NoCache(model=loaded.model, shift=how.shift)
  made, when = got.tokens[0, -length:], got.filled[0, -length:]
  valid = jnp.ones((1, len(ids) + length), bool)

  @jax.jit
  def found(row):
    scores = asked.scores(loaded.params, row[None], valid)[0, len(ids) :]
    return scores.at[:, how.mask_id].set(-jnp.inf).argmax(-1)

  wrong = 0
  for call in when[np.isin(made, ends)]:
    row = np.where(when < call, made, how.mask_id)
    likely = np.asarray(found(jnp.array([*ids, *row])))
    place = np.arange(length) // block
    open_ = (when >= call) & (place == place[when == call][0])
    wrong += not np.isin(likely[open_], ends).all()
  return int(np.isin(made, ends).sum()), wrong


@pytest.mark.slow
def test_ends_last_are_kept_but_come_last(
  command, places, tmp_path, monkeypatch
):
  """Every other token is said to end a text, so that there are many ends."""
  for file in places["all"].iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  loaded = load.load_model(tmp_path)
  ends = list(range(0, loaded.diffusion.mask_id, 2))
  config = json.loads((tmp_path / "config.json").read_text())
  config["diffusion"]["eos_token_id"] = ends
  (tmp_path / "config.json").write_text(json.dumps(config))
  kept = []

  def watched(*given, sample=sampler.sample):
    kept.append(sample(*given))
    return kept[-1]

  monkeypatch.setattr(sampler, "sample", watched)
  block, length = 8, 32
  ids = loaded.tokenizer.encode("the cat", add_special=True)
  flags = f"--block={block}", "--nostop_early", f"--max_new_tokens={length}"
  found = {}
  for when in ("any", "last", "never"):
    done = command(str(tmp_path), *flags, f"--ends={when}")
    assert done[0] == 0
    found[when] = early(loaded, ends, ids, kept[-1], block, length)
  assert found["any"][1] > 0
  assert found["last"][0] > 0 and found["last"][1] == 0
  assert found["never"] == (0, 0)


@pytest.mark.slow
def test_edits_change_what_is_filled(command):
  """Where nothing else is likely enough, nothing; else the model's text."""
  flags = "--block=8", "--policy=threshold:0.01"
  want = told(command("all", *flags))
  same = told(command("all", *flags, "--edit=1"))
  assert same["text"] == want["text"]
  # All is filled at once; edits read it once more, and change it.
  assert want["calls"] == 1 < same["calls"]
  assert told(command("all", *flags, "--edit=0"))["text"] != want["text"]


@pytest.mark.slow
def test_a_canvas_that_grows(command, tmp_path):
  page = tmp_path / "a.html"
  flags = "--max_new_tokens=16", "--block=4", "--policy=threshold:0.5"
  got = told(command("all", *flags, "--canvas=auto:4", f"--html={page}"))
  # This model does not expect to end, so the canvas is as long as it may be.
  assert got["canvas"] == 16
  want = told(command("all", *flags))
  for field in ("text", "tokens", "finish_reason"):
    assert got[field] == want[field]
  assert got["calls"] > want["calls"] and "canvas" not in want
  pieces = page.read_text("utf-8").split("filled = [")[1].split("]")[0]
  assert pieces.count(",") + 1 == got["prompt_tokens"] + 16
  # With no room to grow it is the fixed canvas, call by call.
  fixed = "--block=4", "--policy=threshold:0.5"
  same = told(command("all", *fixed, "--canvas=auto"))
  want = told(command("all", *fixed))
  for field in ("text", "tokens", "calls", "finish_reason"):
    assert same[field] == want[field]
  rows = told(
    command("all", *flags, "--canvas=auto:4", "--prompt=the cat", "--prompt=a")
  )["rows"]
  assert rows[0]["text"] == got["text"] and rows[0]["calls"] == got["calls"]


def test_only_a_row_s_own_canvas_is_drawn(capsys):
  """Six places of eight, of which the tokenizer would show all."""
  loaded = load.load_model(TINY)
  options = SamplerConfig(mask_id=0, length=8, block=4, end=(2,))
  options = dataclasses.replace(options, canvas=Growth(start=6))
  state = variable_length.start([[5, 6]], options, jax.random.key(0))
  drawn = []
  shown = unmask_display.UnmaskDisplay(loaded.tokenizer, [2], 0)
  shown._tty = True
  shown._draw = lambda tokens, filled, open_: drawn.append(
    (tokens.tolist(), filled.tolist(), open_.tolist())
  )
  shown(state)
  assert drawn == [([0] * 6, [-1] * 6, [True] * 6)]
  assert shown.blocks[0][1] == [0]


@pytest.mark.slow
def test_what_is_drawn(command, tmp_path):
  page, picture = tmp_path / "a.html", tmp_path / "a.gif"
  flags = f"--html={page}", f"--gif={picture}", "--guidance=1"
  got = told(command("all", *flags))
  assert "<script>" in page.read_text("utf-8")
  head = picture.read_bytes()
  # A frame for each step of two calls, the masks before, and the end for a
  # second.
  assert head[:6] == b"GIF89a"
  assert head.count(b"\x21\xf9\x04") >= got["calls"] / 2 + 1


def test_a_terminal_shows_each_call(command, monkeypatch):
  monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
  monkeypatch.setattr(unmask_display, "FRAME", 0.0)
  status, lines, errors = command("all", "--block=4")
  assert (status, errors) == (0, "")
  text, got = "\n".join(lines[:-1]), json.loads(lines[-1])
  for now in range(got["calls"]):
    assert f"step {now + 1}\x1b" in text
  assert visualize.HIDDEN in text and "\x1b[2A" in text
  # The last frame has nothing hidden, and is the text.
  last = text.split("\x1b[0J")[-2]
  assert visualize.HIDDEN not in last


@pytest.mark.parametrize(
  ("name", "arguments", "words"),
  [
    (TINY, (), "--mask_token=new"),
    ("all", ("--block=3",), "--block=3: does not divide"),
    ("all", ("--block=16",), "--block=16: does not divide --max_new_tokens=8"),
    ("all", ("--prompt=",), "--prompt"),
    ("all", ("--block=4", "--steps=3"), "a multiple of the 2 blocks"),
    ("four", ("--block=8",), "the model's blocks have 4"),
    ("four", ("--cache=dual",), "--cache=dual: the model is block-causal"),
    ("all", ("--policy=most",), "--policy=most: expected quota"),
    (
      "all",
      ("--policy=threshold:2",),
      "threshold: found 2.0, expected above 0",
    ),
    ("all", ("--policy=factor:nan",), "factor is 'nan', expected a number"),
    ("all", ("--cache=some",), "--cache=some: expected none"),
    ("all", ("--cache=delayed:0",), "refresh is 0, expected at least 1"),
    ("all", ("--plan=dream", "--policy=factor:1"), "expected --policy=quota"),
    ("all", ("--policy=credit:0",), "--policy=credit:0: Credit: threshold"),
    ("all", ("--plan=chance",), "--select=candidate: --plan=chance fills"),
    ("all", ("--remask=cap:0.1",), "expected --plan=chance"),
    (
      "all",
      ("--plan=chance", "--select=random", "--policy=quota+threshold:0.9"),
      "--plan=chance draws",
    ),
    ("all", ("--plan=chance", "--select=random", "--remask=cap"), "cap:E"),
    ("all", ("--remask=rescale:2",), "eta: found 2.0, expected 0 to 1"),
    ("all", ("--canvas=auto", "--plan=chance", "--select=random"), "not with"),
    ("all", ("--canvas=long",), "--canvas=long: expected fixed or auto[:"),
    ("all", ("--canvas=auto:0",), "start is 0, expected at least 1"),
    ("all", ("--canvas=auto:9",), "N from 1 to --max_new_tokens=8"),
    ("all", ("--canvas=auto", "--steps=8"), "--steps=8: not with --canvas"),
    (
      "all",
      ("--canvas=auto", "--cache=dual"),
      "whose tokens move; expected pre",
    ),
    ("all", ("--canvas=auto", "--edit=0.9"), "--edit=0.9: not with"),
    ("all", ("--canvas=auto", "--plan=dream"), "--plan=dream: not with"),
    ("all", ("--canvas=auto", "--policy=credit:0.9"), "e.g. threshold:P"),
    ("four", ("--canvas=auto",), "--canvas=auto: this model is block-causal"),
    ("all", ("--policy=factor:1", "--steps=8"), "expected --policy=quota"),
    ("all", ("--kv=int8",), "--kv: is not for --sampler=diffusion"),
    (TINY, ("--sampler=autoregressive", "--block=4"), "--block: is not for"),
    ("all", ("--prompt=" + "word " * 5000,), "context of"),
    ("all", ("--html=/nowhere/a.html", "--prompt=a"), "cannot be written"),
    ("all", ("--gif=a.gif", "--prompt=a", "--prompt=b"), "found 2 prompts"),
  ],
)
@pytest.mark.sample(2)
def test_errors(command, name, arguments, words):
  status, _, errors = command(name, *arguments)
  assert status == 1 and words in errors
  assert len(errors.splitlines()) <= 3 and "Traceback" not in errors


@pytest.mark.parametrize("name", ["all", "four", "one"])
def test_masks_are_not_read_from_left_to_right(
  capsys, command, places, tmp_path, name
):
  """But for blocks of one token, which are what the model was."""
  text = tmp_path / "text"
  text.write_text("the cat sat on the mat")
  flags = f"--model={places[name]}", f"--text={text}", "--window=4"
  read = cli.call(perplexity.main, ["command", *flags])
  said = [(read, capsys.readouterr().err)]
  said.append(command(name, "--sampler=autoregressive")[::2])
  for status, errors in said:
    assert status == (name != "one"), errors
    assert ("a masked diffusion model; expected" in errors) == bool(status)


@pytest.mark.parametrize("block", [None, 4])
def test_a_mask_in_the_prompt_is_refused(block):
  spec, config = Spec(mask_id=9, block=block), SamplerConfig(length=4)
  with pytest.raises(Exception, match="holds the mask, id 9"):
    prepared_rows.prepare([[1, 9, 2]], [0], spec, config)


def test_frames():
  pieces, filled = ["ab ", "c", "\n", "d"], np.array([-1, 2, 0, 2])
  assert visualize.calls(filled) == [0, 2]
  assert visualize.frame(pieces, filled, 0) == "ab ░\n░"
  assert visualize.frame(pieces, filled, 2) == "ab c\nd"
  text, lines = visualize.redrawn("ab\nc", "call 1", above=2)
  assert lines == 3 and text.startswith("\x1b[2A\r")


def test_nothing_that_a_model_writes_is_obeyed():
  evil = ["\x1b[2J", "</script><script>alert(1)</script>", "{x}"]
  assert "\x1b" not in "".join(visualize.shown(evil))
  page = visualize.page(evil, [0, 1, 2])
  assert page.count("<script>") == page.count("</script>") == 1
