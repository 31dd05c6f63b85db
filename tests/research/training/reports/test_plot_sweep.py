"""Plot of a sweep: which runs are on which line."""

import pytest

from research.training.reports import plot_sweep, plots


@pytest.mark.parametrize(
  "one, other, labels",
  [
    ({"RANK": 4}, {"RANK": 8}, ["RANK=4", "RANK=8"]),
    ({"lora.LoRA.rank": 4}, {"lora.LoRA.rank": 8}, ["rank=4", "rank=8"]),
    # Other bindings of the same last name, at equal values.
    (
      {"lora.LoRA.rank": 4},
      {"dora.DoRA.rank": 4},
      ["lora.LoRA.rank=4", "dora.DoRA.rank=4"],
    ),
    (
      {"train/a.A.size": 4},
      {"heldout/a.A.size": 4},
      ["train/a.A.size=4", "heldout/a.A.size=4"],
    ),
  ],
)
def test_units_of_other_bindings_have_lines_of_their_own(
  one, other, labels, monkeypatch, tmp_path
):
  drawn = []
  monkeypatch.setattr(plots, "save", lambda figure, _: drawn.append(figure))
  groups = [
    ({**unit, "RATE": rate}, [loss + rate])
    for unit, loss in ((one, 1.0), (other, 2.0))
    for rate in (0.1, 0.2)
  ]
  plot_sweep.plot_sweep(
    groups, tmp_path / "x.png", axis="RATE", metric="loss", title=""
  )
  (axes,) = drawn[0].axes
  lines, names = axes.get_legend_handles_labels()
  assert names == labels
  assert [list(x.get_xdata()) for x in lines] == [[0.1, 0.2]] * 2
  assert [list(x.get_ydata()) for x in lines] == [[1.1, 1.2], [2.1, 2.2]]
