"""Every method of adaptation on every packed matrix, as its result has it.

Each method is computed on one of the formats, each format with a sixth of the
methods; with --slow all cells are.
"""

import functools
import re

import pytest

from experiments.studies import results
from tests.research.quant import support_method_table as composition
from tests.research.quant.support_method_table import Cell

CELLS = [
  (name, packing, (j - i) % 6 == 0)
  for i, name in enumerate(composition.kinds())
  for j, packing in enumerate(composition.packings())
]


@functools.cache
def stated():
  """Returns the stored cells by method and format."""
  [table] = results.load("runs/quant/composition.gin")["tables"]
  assert table["header"] == ["method", *composition.packings()]
  return {
    name: dict(zip(composition.packings(), cells, strict=True))
    for name, *cells in table["rows"]
  }


def test_the_table_has_every_method():
  assert list(stated()) == list(composition.kinds())


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "packing"),
  [
    pytest.param(n, p, marks=[] if chosen else pytest.mark.slow)
    for n, p, chosen in CELLS
  ],
)
@pytest.mark.sample(49)
def test_a_cell_is_what_the_table_says(name, packing):
  got = composition.cell(name, packing)
  want = re.fullmatch(r"([~*]?)(0\.\d+)", str(stated()[name][packing]))
  assert want is not None
  assert re.fullmatch(r"[~*]?0\.\d{3}", got.text), got
  # What rounds on one processor is exact on another.
  assert (got.text[0] == "*") == (want[1] == "*")
  assert want[1] or got.start < 1e-6
  assert got.left == pytest.approx(float(want[2]), abs=0.02)


@pytest.mark.parametrize(
  ("cell", "says"),
  [
    (Cell(0.0, 0.25, 1e-6), "0.250"),
    (Cell(1e-7, 0.25, 1e-6), "~0.250"),
    (Cell(0.5, 0.25, 1e-6, based=False), "*0.250"),
    (Cell(0.5, 0.25, 1e-6), "starts 0.5 off"),
    (Cell(0.0, 1.0, 1e-6), "1.000 of the loss left"),
    (Cell(0.0, float("nan"), 0.1), "nan of the loss left, 0.1 off when cut"),
  ],
)
def test_what_does_not_hold_is_said(cell, says):
  assert cell.text == says


def test_a_wrong_gradient_is_found(monkeypatch):
  """Of the mesh: with rows of the batch counted twice, say."""
  cut = composition._cut

  def wrong(t):
    run = cut(t)

    def twice(trained):
      value, out, grads, dx = run(trained)
      return value, out, {k: 2 * g for k, g in grads.items()}, dx

    return twice

  monkeypatch.setattr(composition, "_cut", wrong)
  assert "off when cut" in composition.cell("LoRA", "Q4_1").text
