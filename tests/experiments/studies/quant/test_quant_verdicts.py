"""Verdicts on rows that are made up, training through rounding, and memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.core import config, experiment, from_scratch, train_eval
from experiments.studies import protocol
from experiments.studies.quant import (
  memory_study,
  quant_rows,
  quant_training,
  quant_verdicts,
)
from research.data.pipeline import Pipeline
from research.data.sources import synthetic
from research.interop import load
from research.lora.methods.lora import LoRA
from research.nn import presets
from research.quant.algorithms import qat
from research.quant.algorithms.calibrate import Calibration
from research.quant.formats.affine import Affine
from research.quant.quantize import Quantize
from research.quant.reports import compare, report_errors
from research.training import loop
from research.training.objectives.objective import NextToken
from research.typing import UserError


def _row(name, bits=4.3, kl=0.1, group="integers", **more):
  row = dict(row=name, bits_per_weight=bits, kl=kl, kl_se=0.001, group=group)
  row |= dict(perplexity=10.2, base_perplexity=10.0, accuracy=0.49)
  row |= dict(base_accuracy=0.5, same_top=0.9, weight_error=0.1, nll_change=kl)
  return row | more


def _rows(*rows):
  return {row["row"]: row for row in rows}


def _holds(verdicts):
  return [v.holds for v in verdicts]


def test_quality_is_that_of_the_best_row_of_the_band():
  rows = _rows(
    _row("good", same_top=0.96),
    _row("bad", kl=0.2, same_top=0.5),
    _row("wide", bits=5.0, kl=0.01, same_top=1.0),
  )
  found = quant_verdicts.quality(rows)
  # 98.04% of the perplexity, 98% of the accuracy, 96% of the tokens.
  assert _holds(found) == [True, True, True, False, False, False]
  assert all("good" in v.found for v in found)
  assert not quant_verdicts.quality(_rows(_row("wide", bits=5.0)))


def test_differences_count_from_two_errors_on():
  a, b = _row("a", kl=0.1), _row("b", kl=0.1028)
  assert quant_verdicts.more_kl(b, a) is None
  assert quant_verdicts.more_kl(_row("b", kl=0.1029), a) is True
  assert quant_verdicts.more_kl(a, _row("b", kl=0.1029)) is False


def test_formats_are_compared_where_both_are():
  rows = _rows(
    _row("nf4-b64", bits=4.5, kl=0.1),
    _row("nf4-b64-dq", bits=4.127, kl=0.1001),
    _row("fp4-b64", bits=4.5, kl=0.2, perplexity=10.1),
    _row("GPTQ", kl=0.05, group="calibrated"),
  )
  free, worse, order, seen = quant_verdicts.formats(rows)
  assert free.holds and worse.holds and seen.holds
  assert order.holds and "fp4-b64" in order.found
  rows["GPTQ"] = _row("GPTQ", kl=0.101, group="calibrated")
  assert quant_verdicts.formats(rows)[-1].holds is None
  del rows["fp4-b64"], rows["GPTQ"]
  assert quant_verdicts.formats(rows) == []


def test_smaller_errors_of_weights_may_be_a_worse_model():
  rows = _rows(
    _row("int3-asym-g64", kl=0.9, weight_error=0.20),
    _row("hqq3-g64", kl=2.0, weight_error=0.19),
    _row("int4-asym-g64", kl=0.2, weight_error=0.09),
    _row("hqq4-g64", kl=0.1, weight_error=0.08),
  )
  found = quant_verdicts.weights_are_not_the_goal(rows)
  assert _holds(found) == [False, True]


def test_too_few_tokens():
  rows = _rows(
    _row("int3", kl=0.5, group="uncalibrated"),
    _row("512", kl=0.6, group="calibration", calibrated_on=512),
    _row("9,000", kl=0.2, group="calibration", calibrated_on=9000),
    _row("damped", kl=0.4, group="calibration, damped", calibrated_on=512),
  )
  assert _holds(quant_verdicts.too_few_tokens(rows)) == [True, True]
  assert "one draw" in quant_verdicts.too_few_tokens(rows)[0].found
  # One draw in two is not worse.
  again = _row("512, draw 1", kl=0.5, group="calibration", calibrated_on=512)
  rows["512, draw 1"] = again
  found = quant_verdicts.too_few_tokens(rows)
  assert _holds(found) == [None, True]
  # Of each row its own draws are counted.
  assert "2 draws" in found[0].found and "one draw" in found[1].found


def test_recovery_is_over_seeds():
  rows = _rows(
    _row("int3", kl=1.0, group="rounded"),
    *(
      _row(f"masters, seed {i}", kl=kl, group="masters")
      for i, kl in enumerate((0.30, 0.31, 0.32))
    ),
    *(
      _row(f"LoRA, seed {i}", kl=kl, group="LoRA")
      for i, kl in enumerate((0.2, 0.6, 0.5))
    ),
  )
  found = quant_verdicts.recovery(rows)
  assert _holds(found) == [True, None]
  # Student's interval of 0.70, 0.69, 0.68: 4.303 * 0.01 / sqrt(3).
  assert "0.690 ± 0.025" in found[0].found


def test_outliers_name_the_matrix():
  def one(inputs, output):
    return dict(inputs=inputs, output=output, weights=5.0)

  matrices = {
    "layers/0/attention/q": one(30.0, 0.1),
    "layers/0/mlp/up": one(20.0, 0.1),
    "layers/0/mlp/down": one(900.0, 0.3),
  }
  rows = _rows(_row("int4", matrices=matrices))
  found = quant_verdicts.outliers(rows)
  assert _holds(found) == [True, True, True]
  assert found[1].found.startswith("layers/0/mlp/down: 900")
  # Of three, resampled medians are any of them.
  assert found[2].found.endswith(
    "down 0.300, median 0.100 (0.100 to 0.300) (too narrow: a bootstrap of 3)"
  )


def _blocks(kls, error=0.01):
  """Returns rows of NF4 and integers whose ratios at 32 and 128 are known."""
  return _rows(
    *(
      _row(
        f"{kind}{n}",
        kl=kl,
        kl_se=error,
        matrices={f"m{i}": {"weight": kl * (1 + 0.01 * i)} for i in range(3)},
      )
      for n, pair in zip((32, 128), kls, strict=True)
      for kind, kl in zip(("nf4-b", "int4-asym-g"), pair, strict=True)
    )
  )


@pytest.mark.slow
def test_the_crossover_is_where_the_ratio_surely_passes_one():
  found = quant_verdicts.crossover(_blocks(((0.9, 0.8), (1.0, 1.1))))
  assert _holds(found) == [True, True, True]
  # 0.9 / 0.8 = 1.125, its error 1.125 sqrt((1/90)^2 + (1/80)^2) = 0.0188.
  assert "32: 1.125 ± 0.019" in found[2].found
  # Errors of 0.05 make it 0.094: less than two of them above 1.
  found = quant_verdicts.crossover(_blocks(((0.9, 0.8), (1.0, 1.1)), 0.05))
  assert _holds(found) == [True, True, None]
  found = quant_verdicts.crossover(_blocks(((0.8, 0.8), (1.0, 1.1))))
  assert _holds(found) == [True, False, None]
  found = quant_verdicts.crossover(_blocks(((0.6, 0.8), (1.0, 1.1))))
  assert _holds(found) == [True, False, False]


def test_of_one_matrix_no_error_is_known():
  rows = _blocks(((0.9, 0.8), (1.0, 1.1)))
  for row in rows.values():
    row["matrices"] = {"m0": row["matrices"]["m0"]}
  found = quant_verdicts.crossover(rows)
  assert _holds(found) == [True, None, True]
  assert "32: 1.125 (one value)" in found[1].found


def test_errors_of_normal_numbers_are_published_ones():
  # To a percent.
  for size, want in ((32, 0.0808), (128, 0.1003)):
    errors = quant_verdicts.normal_errors(Affine(block=size))
    assert len(errors) == 8
    assert np.sqrt((errors**2).mean()) == pytest.approx(want, rel=0.01)


SIZES = presets.Sizes(
  vocab=32, width=32, depth=1, heads=2, kv_heads=2, head_dim=16, hidden=32
)
DATA = Pipeline(
  source=synthetic.Markov(vocab=32, length=33, count=64),
  length=32,
  batch_size=8,
)
FORMAT = Affine(bits=3, block=16, symmetric=True)


@pytest.mark.slow
def test_training_comes_closer_to_the_model_before():
  loaded = from_scratch.FromScratch(sizes=SIZES).load()
  how = dict(rate=3e-3, steps=60, adapter=LoRA(rank=8, alpha=8.0))
  made = quant_training.Trained(format=FORMAT, data=DATA, **how)
  packed = made.with_model(loaded)(loaded.params, jax.random.key(0))
  plain = Quantize(format=FORMAT)(loaded.params)
  sizes = [report_errors.sizes(p) for p in (packed, plain)]
  assert sizes[0].bits_per_weight == sizes[1].bits_per_weight == 4
  tokens = np.stack([e.tokens for e in DATA.source.examples(None)])
  base = compare.base_outputs(loaded.model, loaded.params, tokens[:8], batch=8)
  before, after = (
    compare.compare(base, loaded.model, p).kl for p in (plain, packed)
  )
  assert after < 0.7 * before
  with pytest.raises(UserError, match="has no model"):
    made(loaded.params, jax.random.key(0))


def test_rows_say_what_they_read():
  rows = quant_rows.budget(Calibration(length=64), tokens=(32, 256))
  assert [r.calibrated_on for r in rows] == [None, 32, 32, 256, 256]
  drawn = quant_rows.budget(Calibration(length=64, seed=5), (32,), draws=2)
  assert [r.name for r in drawn[1::2]] == [
    "GPTQ, 32 tokens",
    "GPTQ, 32 tokens, draw 1",
  ]
  assert [r.transforms[0].calibration.seed for r in drawn[1::2]] == [5, 6]
  trained = quant_rows.trained(DATA, seeds=2)
  assert [r.transforms[0].data.seed for r in trained[1:3]] == [0, 1]
  assert len({r.name for r in trained}) == 9
  assert dataclasses.replace(rows[0], transforms=()).calibrated_on is None


def test_memory_is_what_the_arithmetic_says(tmp_path):
  settings = ["memory_study.Memory.compiled=False"]
  run = config.read("runs/quant/memory_llama2_70b.gin", settings, protocol.Run)
  study = run.experiment.study
  shared = study.prepare(tmp_path)
  rows = {arm: study.run(arm, {}, shared) for arm in study.arms}
  verdicts = study.verdicts(rows)
  # Queries and outputs, keys and values, three of the feed-forward.
  layer = 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
  rest = 2 * 32000 * 8192 + 161 * 8192
  assert rows["bfloat16"]["weights GB"] == (80 * layer + rest) * 2 / 1e9
  four = 80 * layer * (4 + 20 / 128) / 8 + 2 * rest
  assert rows["int4-asym-g128"]["weights GB"] == pytest.approx(four / 1e9)
  cache = 2 * 80 * 8 * 128 * 2 * 4096
  held = rows["mxfp4"]["with cache GB"] - rows["mxfp4"]["weights GB"]
  assert held == pytest.approx(cache / 1e9, rel=1e-3)
  assert [v.holds for v in verdicts] == [True, True, False, True]
  # 24 GB less what stays in 16 bits, over the matrices alone.
  left = 24e9 - 2 * rest
  want = [8 * left / (80 * layer), 8 * (left - cache) / (80 * layer)]
  assert memory_study.bits_within(study.table(rows), 24) == pytest.approx(want)
  assert f"{want[0]:.2f} bits" in verdicts[3].found


def test_a_step_of_generation_holds_weights_packed():
  sizes = dataclasses.replace(
    SIZES, width=128, hidden=256, head_dim=64, depth=12
  )
  model, shapes = memory_study.shapes_of(from_scratch.FromScratch(sizes=sizes))
  whole, packed = (
    memory_study.row(model, shapes, format, context=8, compiled=True)
    for format in (None, Affine(bits=4, block=64))
  )
  # Beside what it is given, a step has a layer's decoded matrix or two.
  matrix = 4 * 128 * 256 / 1e9
  for line in (whole, packed):
    assert 0 <= line["step GB"] - line["with cache GB"] < 3 * matrix
  assert packed["step GB"] < 0.6 * whole["step GB"]


@pytest.mark.slow
def test_a_run_leaves_what_comes_after_training_packed(tmp_path):
  made = experiment.Experiment(
    model=from_scratch.FromScratch(sizes=SIZES),
    optimizer=optax.sgd(0.3),
    objective=NextToken(),
    data=DATA,
    plan=loop.TrainConfig(steps=2),
    heldout=DATA,
    eval_batches=1,
    transforms=(qat.Prepare(format=FORMAT),),
    after=(qat.Convert(),),
  )
  found = train_eval.train(made, tmp_path)
  loaded = load.load_model(tmp_path / "model", packed=True)
  sizes = report_errors.sizes(loaded.params)
  assert (sizes.packed_weights, sizes.bits_per_weight) == (7 * 32 * 32, 4)
  # The packed model is the one that was measured.
  batch = jax.tree.map(jnp.asarray, DATA.evaluation(None, 1)[0])
  loss, weight, _ = NextToken(loaded.model)(loaded.params, batch, None)
  want = np.log(found["perplexity_after"])
  assert float(loss / weight) == pytest.approx(want, rel=1e-5)
  assert found["perplexity_after"] < found["perplexity_before"]
