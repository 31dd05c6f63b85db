"""The study of small text: what its arms see, its reader, its verdicts."""

import dataclasses
import json
import pathlib
import shutil
import stat

import numpy as np
import pytest

from experiments import study as command
from experiments.core import cli, config
from experiments.studies import protocol
from experiments.studies.vlm import small_text, verdicts
from experiments.studies.vlm.tesseract import PROGRAM, Tesseract
from research.typing import UserError

RUN = "runs/vlm/claims_tiling.gin"
STUDY = config.read(RUN, root=protocol.Run).experiment.study
SHARED = STUDY.prepare(pathlib.Path())


def test_arms_differ_in_pixels_and_in_soft_tokens():
  """Four arms cross both; tiles have all pixels, and the reduced page."""
  page = STUDY.task(count=1)[0].image
  found = {}
  for arm in STUDY.variants:
    tiny = STUDY.pages(arm)
    connector = small_text.linear(arm.tiling.pool, tiny.width)
    views = tiny.preprocessor(connector).views(page)
    assert len(views.pixels) == tiny.views
    assert tiny.tokens(connector) == views.plan.soft_tokens
    found[arm.name] = views.pixels[..., 0].size, tiny.tokens(connector)
  assert found == {
    small_text.REDUCED: (32 * 32, 16),
    small_text.MORE_TOKENS: (32 * 32, 64),
    small_text.FEW_TOKENS: (64 * 64, 16),
    small_text.WHOLE: (64 * 64, 64),
    small_text.TILES: (5 * 32 * 32, 80),
  }
  assert len({STUDY.settings(x) for x in STUDY.arms}) == 2 + len(found)


def test_each_figure_is_a_token_and_rows_have_room():
  task = STUDY.task(count=20)
  tokenizer = STUDY.tiny.tokenizer(task)
  for arm in STUDY.variants:
    tiny = STUDY.pages(arm)
    connector = small_text.linear(arm.tiling.pool, tiny.width)
    row = tiny.questions(connector, task).rows(tokenizer)[3]
    assert (row["tokens"] == tiny.vocab).sum() == tiny.tokens(connector)
    assert row["weights"].sum() == STUDY.length + 1  # and the end


def fake(folder, text):
  """Leaves a program of the reader's name that runs a shell script."""
  path = folder / PROGRAM
  path.write_text(f"#!/bin/sh\n{text}\n")
  path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_reader_reads_the_line_that_was_cut_out(tmp_path, monkeypatch):
  """The program gets all images in order, one character set, one thread."""
  monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
  fake(
    tmp_path,
    'test "$OMP_THREAD_LIMIT$6" = 1tessedit_char_whitelist=01 || exit 3\n'
    'printf "level\\tpage_num\\tconf\\ttext\\n"; page=0\n'
    "while read -r file; do test -s $file || exit 4\n"
    "page=$((page + 1)); file=${file##*/}\n"
    'printf "1\\t$page\\t-1\\t\\n"; test $page = 2 && continue\n'
    'printf "5\\t$page\\t96\\t${file%.png}\\n5\\t$page\\t90\\t7\\n"\n'
    'done < "$1"',
  )
  image = np.full((40, 50, 3), 255, np.uint8)
  image[30:34, 10:20] = 0
  expected = [f"{i}7" if i != 1 else "" for i in range(12)]
  assert Tesseract()([image] * 12, "01") == expected
  line = np.asarray(Tesseract().line(image))[..., 0] < 128
  rows, columns = (np.flatnonzero(line.any(axis)) for axis in (1, 0))
  assert abs(len(rows) - 32) <= 1 and abs(len(columns) - 80) <= 1
  assert rows[0] >= 16 and line.shape[0] - rows[-1] > 16
  fake(tmp_path, "echo page_num level text")
  with pytest.raises(UserError, match="expected a table of words"):
    Tesseract()([image], "01")
  fake(tmp_path, "echo broken >&2; exit 5")
  with pytest.raises(UserError, match="failed with 5: broken"):
    Tesseract()([image], "01")


def test_a_reader_is_scored_by_height_on_both_pages():
  asked = {x.image.tobytes(): x for x in STUDY.task(count=30, split="heldout")}
  sizes = []

  def reader(pages, alphabet):
    assert alphabet == STUDY.alphabet
    sizes.append({x.shape for x in pages})
    found = [asked.get(x.tobytes()) for x in pages]
    return [x.answer if x and "12" in x.stratum else "no" for x in found]

  study = dataclasses.replace(STUDY, reader=reader, heldout=30)
  whole, reduced = (study.run(x, {}, SHARED) for x in small_text.READERS)
  assert whole["heights"] == [0, 0, 0, 1] and whole["score"] > 0
  assert reduced["score"] == 0
  assert sizes == [{(64, 64, 3)}, {(32, 32, 3)}]


def test_without_the_reader_its_arms_say_what_to_install(monkeypatch):
  monkeypatch.setenv("PATH", "")
  study = dataclasses.replace(STUDY, heldout=5)
  with pytest.raises(UserError, match="apt-get install tesseract-ocr"):
    study.run(small_text.PAGE_READER, {}, SHARED)
  only = [x for x in STUDY.arms if "seed" in x]  # as the message advises
  assert not {*only} & {*small_text.READERS} and len(only) == 15


@pytest.mark.skipif(shutil.which(PROGRAM) is None, reason="no tesseract")
def test_tesseract_reads_large_text_and_nothing_of_few_pixels():
  read = STUDY.task(count=16, heights=(16,), split="heldout")
  small = STUDY.task(count=16, heights=(4,), split="heldout")
  for task, least, most in ((read, 0.9, 1), (small, 0, 0.3)):
    found = Tesseract()([x.image for x in task], "0123456789")
    right = np.mean([a == x.answer for a, x in zip(found, task, strict=True)])
    assert least <= right <= most


def rows_of(scores, ceiling=0.8):
  """Returns rows of arms with these scores of small and of large text."""
  rows = {small_text.PAGE_READER: {"heights": [ceiling, ceiling, 1, 1]}}
  for arm, (small, large) in scores.items():
    for s, more in enumerate((-0.01, 0, 0.01)):
      heights = [small + more, small, large, large + more]
      rows[f"{arm}, seed {s}"] = {"heights": heights}
  return rows


def states(scores, **more):
  return [x.holds for x in verdicts.small_text(rows_of(scores, **more), 3)]


def test_verdicts_are_about_small_text():
  found = dict.fromkeys(
    (small_text.REDUCED, small_text.MORE_TOKENS), (0.2, 0.9)
  ) | dict.fromkeys((small_text.FEW_TOKENS, small_text.TILES), (0.7, 0.95))
  assert states(found) == [True] * 5
  assert states(found, ceiling=0.5) == [True] * 4 + [False]
  found[small_text.MORE_TOKENS] = found[small_text.TILES]
  found[small_text.FEW_TOKENS] = (0.1, 0.9)
  assert states(found) == [True, True, False, False, True]
  found[small_text.TILES] = (0.1, 0.9)
  assert states(found) == [False, False, False, False, True]


@pytest.mark.slow
def test_the_command_reads_by_height(tmp_path):
  small = (
    *("base.Tiny.width=16", "base.Tiny.depth=1", "base.Tiny.heads=2"),
    *("base.Tiny.batch=4", "small_text.SmallText.rows=12"),
    *("small_text.SmallText.heldout=40", "STEPS=2"),
  )
  flags = [f"--config={RUN}", f"--workdir={tmp_path}", "--only=tiles.*seed 0"]
  flags += [f"--set={x}" for x in small]
  assert cli.call(command.main, ["study", *flags]) == 0
  row = json.loads(
    (tmp_path / "arms" / "tiles_and_reduced_page_seed_0.json").read_text()
  )["row"]
  assert row["tokens"] == 80 and row["views"] == 5
  assert len(row["heights"]) == len(STUDY.heights)
  assert np.isfinite(row["loss"])
