"""Models of several widths in several bits: bytes, verdicts, the command."""

import dataclasses
import json
import math

import pytest

from experiments import study as command
from experiments.core import cli, config, experiment, from_scratch
from experiments.studies import protocol
from experiments.studies.quant import quant_ladder
from research.data import bpe
from research.data.pipeline import Pipeline
from research.nn import presets
from research.optim import optim
from research.quant.algorithms.calibrate import Calibration
from research.training.loop import TrainConfig
from research.training.objectives import objective
from research.typing import UserError
from tests.support_letters import Text

BPE = bpe.Bpe(documents=Text(4, 200), size=260)
SIZES = presets.Sizes(
  vocab=272,
  width=16,
  depth=1,
  heads=1,
  kv_heads=1,
  head_dim=16,
  hidden=32,
  tied=True,
)
TEXT = Calibration(source=Text(1, 400), windows=4, length=32)
LADDER = quant_ladder.Ladder(
  training=experiment.Experiment(
    model=from_scratch.FromScratch(sizes=SIZES, tokenizer=BPE),
    optimizer=optim.adamw(optim.constant(1e-3)),
    objective=objective.NextToken(),
    data=Pipeline(source=Text(4, 200), length=32, batch_size=2),
    plan=TrainConfig(steps=2),
  ),
  text=TEXT,
  rows=(quant_ladder.rows(TEXT, bits=(8,), block=16, nearest=(3,)),),
  widths=(16,),
  seeds=1,
  rules=(quant_ladder.fewer_bits,),
)


def _points(optimum: float, seeds: int = 3) -> list[dict]:
  """Returns points whose best number of bits is known.

  The loss is a line in the log of weights, plus what rounding costs: at equal
  bytes, one bit less is worth log(b / (b - 1)), until rounding costs more.
  """
  out = []
  for seed in range(seeds):
    for width in (64, 128, 256):
      for bits in (8, 4, 2):
        weights = 12 * width**2
        lost = (optimum / bits) ** 4
        out.append(
          {
            "row": f"{bits} bits",
            "width": width,
            "seed": seed,
            "nbytes": weights * bits // 8,
            "bits_per_weight": bits,
            "loss": 5 - 0.2 * math.log(weights) + 0.05 * lost + 0.001 * seed,
          }
        )
  return out


@pytest.mark.parametrize(
  "optimum, found",
  [(0.5, [True, True]), (3.0, [True, False]), (9.0, [False, False])],
)
def test_fewer_bits_win_until_rounding_costs_more(optimum, found):
  verdicts = quant_ladder.fewer_bits(_points(optimum))
  assert [v.holds for v in verdicts] == found
  assert "4 bits" in verdicts[0].claim and "8 bits" in verdicts[0].claim
  assert all("3 seeds" in v.found for v in verdicts)


def test_the_gain_is_what_it_was_made_to_be():
  (gain, *others) = quant_ladder.gain(_points(0), "4 bits", "8 bits").values()
  # Half the bits, twice the weights: the line's slope times log 2.
  assert gain == pytest.approx(0.2 * math.log(2), rel=1e-6)
  assert others == pytest.approx([gain, gain])


def test_models_that_share_no_size_say_nothing():
  few = [p for p in _points(1) if p["width"] == 64]
  assert not quant_ladder.gain(few, "4 bits", "8 bits")
  assert not quant_ladder.fewer_bits(few)


def test_one_seed_is_no_evidence():
  (first, _) = quant_ladder.fewer_bits(_points(0.5, seeds=1))
  assert first.holds is None and "(one value)" in first.found


def test_widths_are_multiples_of_heads():
  with pytest.raises(UserError, match=r"Ladder.widths: found 24.*16"):
    dataclasses.replace(LADDER, widths=(16, 24))


def test_rows_have_an_embedding_in_8_bits_and_gptq_below():
  rows = quant_ladder.rows(TEXT, bits=(8, 4, 2), nearest=(3,))
  methods = {
    r.name: [rule.method.name for rule in r.transforms[0].rules] for r in rows
  }
  gptq = ["nearest", "GPTQ, groups, fresh"]
  assert methods == {
    "8 bits": ["nearest", "nearest"],
    "4 bits": gptq,
    "2 bits": gptq,
    "3 bits, nearest": ["nearest", "nearest"],
  }
  assert {r.calibrated_on for r in rows} == {None, 128}


def test_an_arm_has_its_width_and_seed():
  read = config.read("runs/quant/claims_ladder.gin", root=protocol.Run)
  ladder = read.experiment.study
  made = ladder.experiment(192, 2)
  sizes = made.model.sizes
  assert (sizes.width, sizes.heads, sizes.hidden) == (192, 6, 576)
  assert made.model.seed == made.data.seed == made.seed == 2
  assert ladder.arms[:2] == ["w64-s0", "w96-s0"]


@pytest.mark.slow
def test_the_command_trains_measures_and_keeps(tmp_path, capsys, monkeypatch):
  run = protocol.Run(study=LADDER)
  text = "protocol.Run.study = @quant_ladder.Ladder()"
  monkeypatch.setattr(config, "read", lambda *x, **y: config.Read(run, text))
  argv = ["study", "--config=x.gin", f"--workdir={tmp_path}"]
  assert cli.call(command.main, argv) == 0
  result = json.loads(capsys.readouterr().out.splitlines()[-1])
  (table,) = result["tables"]
  lines = [dict(zip(table["header"], r, strict=True)) for r in table["rows"]]
  sizes = {(x["width"], x["row"]): x for x in lines}
  assert len(sizes) == 2
  # Eight bits of an embedding are among the bytes, of every row.
  count = 4 * 16**2 + 3 * 16 * 32
  rest = 4 * 3 * 16 + 272 * 16 * (1 + 2 / 16)  # norms, and the embedding
  for bits, name in ((8, "8 bits"), (3, "3 bits, nearest")):
    # Codes, and a float16 scale and a zero for each 16; 3 bits fill bytes up.
    matrices = count * (bits + 16 / 16 + bits / 16) / 8
    assert sizes[16, name]["kB"] == pytest.approx(
      (matrices + rest) / 1e3, rel=0.02 if bits == 3 else 1e-6
    )
  kl = [sizes[16, name]["KL"] for name in ("8 bits", "3 bits, nearest")]
  assert kl[1] > 4 * kl[0] > 0
  assert (tmp_path / "ladder.png").read_bytes()[:4] == b"\x89PNG"
  monkeypatch.setattr(
    quant_ladder.train_eval, "train", lambda *x: pytest.fail("trained again")
  )
  (tmp_path / "arms" / "w16-s0.json").unlink()  # the model is still there
  assert cli.call(command.main, argv) == 0
  (tmp_path / "arms" / "w16-s0.json").unlink()
  (tmp_path / "w16-s0" / "settings.txt").write_text("others")
  assert cli.call(command.main, argv) == 1
  assert "settings.txt: was made from other" in capsys.readouterr().err
