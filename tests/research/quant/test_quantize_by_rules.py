"""Tests quantization by rules on tiny models, with sequential calibration."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import tree, weights
from research.data.sources import PydocTopics
from research.interop.loaded import Loaded
from research.lora.adapt import Adapt
from research.quant import methods, quantize_by_rules
from research.quant.algorithms import calibrate
from research.quant.algorithms.calibrate import Calibration
from research.quant.algorithms.clip import Clip
from research.quant.algorithms.gptq import GPTQ
from research.quant.formats.affine import Affine
from research.quant.formats.codebook import Codebook
from research.quant.formats.ggml import GGML
from research.quant.formats.nvfp4 import NVFP4
from research.quant.methods import GPTQMethod, RoundToNearest
from research.quant.quantize_by_rules import Quantization, Rule
from research.quant.reports import report_errors
from research.typing import UserError
from tests import support, support_mesh

FORMAT = Affine(block=4)
LAYERS = Rule(match="^layers/", format=FORMAT)
BY_GPTQ = Rule(match="^layers/", format=FORMAT, method=GPTQMethod())


class Bytes:
  """A tokenizer of 67 tokens."""

  def encode(self, text):
    return [b % 67 for b in text.encode()]


@dataclasses.dataclass(frozen=True)
class Text:
  """A short one."""

  def __len__(self):
    return 1

  def __getitem__(self, index):
    return PydocTopics("train")[0][:400]


CALIBRATION = Calibration(source=Text(), windows=6, length=16, batch=3)


def run(model, params, *given, calibration=CALIBRATION, **options):
  how = Quantization(rules=given, calibration=calibration, **options)
  loaded = Loaded(model, params, Bytes(), {})
  return how.with_model(loaded).run(params)


@functools.cache
def known():
  model = support.model()
  return model, support.params(model)


@functools.cache
def done(**options):
  return run(*known(), BY_GPTQ, **options)


def dense(params):
  return jax.tree.map(weights.dense, params, is_leaf=weights.is_weight)


@pytest.mark.slow
def test_every_matrix_of_the_layers_is_packed():
  model, params = known()
  packed, report = done()
  assert len(report.rows) == 7 * 3
  for layer in tree.layers(packed):
    for path, w in quantize_by_rules.matrices(layer).items():
      assert w.format == FORMAT, path
  assert packed["embed"] is params["embed"]
  assert packed["run0"]["layer0"]["attention"]["q"].shape == (3, 32, 32)
  assert not report.warnings() and report.summary()["failed"] == 0
  hidden, _ = model.apply({"params": packed}, jnp.ones((1, 4), jnp.int32))
  want, _ = model.apply({"params": dense(packed)}, jnp.ones((1, 4), jnp.int32))
  np.testing.assert_allclose(hidden, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_compensated_outputs_are_better_than_nearest():
  _, report = done()
  better = [row.output_error < row.nearest_error for row in report.rows]
  assert np.mean(better) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("calibration", [CALIBRATION, None])
@pytest.mark.sample(3)
def test_nearest_by_rules_is_the_format_alone(calibration):
  model, params = known()
  rule = Rule(match="mlp/up$", format=FORMAT)
  packed, report = run(model, params, rule, calibration=calibration)
  w = params["run0"]["layer0"]["mlp"]["up"][1]
  want = FORMAT.decode(FORMAT.encode(w))
  got = weights.dense(packed["run0"]["layer0"]["mlp"]["up"])[1]
  np.testing.assert_array_equal(got, want)
  assert all(r.output_error == r.nearest_error for r in report.rows)


@pytest.mark.slow
def test_inputs_come_from_quantized_layers():
  """Errors are recomputed from the packed model alone, in float64."""
  model, params = known()
  packed, report = done()
  windows = CALIBRATION.read(Bytes())
  new, old = dense(packed), list(tree.layers(params))
  inputs = {}
  calibrate.walk(
    model,
    new,
    windows.tokens,
    lambda i, layer, x: inputs.setdefault(i, x) and layer,
  )
  rows = {row.address: row for row in report.rows}
  for i, layer in enumerate(tree.layers(new)):
    spied = {}

    class Spy(weights.Weight):
      def __init__(self, w, path):
        self.w, self.path = w, path
        self.shape, self.dtype = w.shape, w.dtype

      def einsum(self, eq, x, spied=spied):
        spied[self.path] = np.asarray(x, np.float64)
        return weights.einsum(eq, x, self.w)

      def dense(self):
        return self.w

    seen = tree.map_paths(
      lambda p, w: Spy(w, p) if w.ndim > 1 else w,
      layer,  # noqa: B023
    )
    calibrate.outputs.__wrapped__(inputs[i].block, seen, inputs[i].x)
    was = quantize_by_rules.matrices(old[i])
    for path, w in quantize_by_rules.matrices(layer).items():
      x = spied[path].reshape(-1, w.shape[0])
      error = np.linalg.norm(x @ (np.asarray(w - was[path], np.float64)))
      error /= np.linalg.norm(x @ np.asarray(was[path], np.float64))
      got = rows[f"layers/{i}/{path}"].output_error
      assert got == pytest.approx(error, rel=2e-3), path


@pytest.mark.slow
@pytest.mark.parametrize("sequential", ["layers", "none"])
def test_other_orders_measure_other_inputs(sequential):
  _, report = done(sequential=sequential)
  _, stages = done()
  found = {r.address: r.output_error for r in report.rows}
  want = {r.address: r.output_error for r in stages.rows}
  # Of the first layer the first stage sees the same, whatever the order.
  assert found["layers/0/attention/q"] == want["layers/0/attention/q"]
  assert found["layers/0/mlp/down"] != want["layers/0/mlp/down"]


@pytest.mark.slow
def test_drift_is_corrected():
  model, params = known()
  some = dataclasses.replace(BY_GPTQ, match="attention/o$|down$")
  without, _ = run(model, params, some)
  method = GPTQMethod(options=GPTQ(drift=0.5))
  packed, report = run(model, params, dataclasses.replace(some, method=method))
  assert len(report.rows) == 6
  tokens = CALIBRATION.read(Bytes()).tokens

  def error(found):
    got, _ = model.apply({"params": found}, jnp.asarray(tokens))
    want, _ = model.apply({"params": params}, jnp.asarray(tokens))
    return float(jnp.linalg.norm(got - want))

  assert error(packed) < error(without)


@pytest.mark.parametrize(
  "format, options",
  [
    (Codebook(block=32, nested=0), GPTQ()),
    (Codebook(block=32), GPTQ()),
    (Affine(block=0, bits=3), GPTQ(clip=Clip(candidates=20))),
    (Affine(block=8, symmetric=True), GPTQ(order="activations")),
    (GGML(kind="Q4_1"), GPTQ(order="activations")),
    (NVFP4(), GPTQ()),
  ],
  ids=lambda x: getattr(x, "name", ""),
)
@pytest.mark.sample(6)
def test_any_grid_is_compensated(format, options):
  model, params = known()
  rule = Rule(
    match="attention/o$", format=format, method=GPTQMethod(options=options)
  )
  packed, report = run(model, params, rule)
  assert {row.format for row in report.rows} == {format.for_shape(32, 32).name}
  better = [row.output_error < row.nearest_error for row in report.rows]
  assert len(better) == 3 and np.mean(better) > 0.6
  first = next(tree.layers(packed))
  q = first["attention"]["o"]
  scattered = format.group_local and options.order == "activations"
  assert (q.order is not None) == scattered
  # What is stored decodes to what was measured.
  w = np.asarray(params["run0"]["layer0"]["attention"]["o"][0])
  error = np.linalg.norm(weights.dense(q) - w) / np.linalg.norm(w)
  assert report.rows[0].weight_error == pytest.approx(error, rel=1e-5)


@pytest.mark.slow
def test_experts_are_calibrated_on_their_tokens():
  model = support_mesh.model("experts")
  params = support.params(model)
  rule = Rule(match="experts/down", format=FORMAT, method=GPTQMethod())
  packed, report = run(model, params, rule)
  found = [r for r in report.rows if r.address.startswith("layers/0/")]
  assert [r.address for r in found] == ["layers/0/mlp/experts/down"]
  assert all(r.tokens < 6 * 16 for r in found)  # the least of the experts'
  assert all(r.output_error < r.nearest_error for r in found)
  q = next(tree.layers(packed))["mlp"]["experts"]["down"]
  assert q.shape == next(tree.layers(params))["mlp"]["experts"]["down"].shape


def test_all_experts_count_in_average_bits():
  model = support_mesh.model("experts")
  rules = (
    Rule(match="experts/", format=Affine(block=4, bits=2)),
    Rule(match="^layers/", format=Affine(block=4, bits=8)),
  )
  packed, report = run(model, support.params(model), *rules, calibration=None)
  want = report_errors.sizes(packed).bits_per_weight
  assert report.summary()["bits_per_weight"] == pytest.approx(want)


@pytest.mark.slow
def test_experts_have_hessians_of_their_own():
  _, params = known()
  w = params["run0"]["layer0"]["attention"]["o"]  # layers, for experts
  x = np.random.default_rng(0).standard_normal((3, 96, 32)).astype(np.float32)
  x[1] = 0  # to which no token came
  seen = dict(
    xx=jnp.einsum("eti,etj->eij", x, x), n=jnp.asarray([[96.0], [0.0], [96.0]])
  )
  how = dict(format=FORMAT, method=GPTQMethod())
  (q,), (dense,), (found,) = methods.round_matrices(
    (w,), seen, **how, compare=True
  )
  assert q.shape == w.shape and found.dead.tolist() == [0, 32, 0]
  want = FORMAT.decode(FORMAT.encode(w[1]))
  np.testing.assert_array_equal(dense[1], want)
  assert (found.output_error < found.nearest_error)[np.array([0, 2])].all()
  one = {name: a[2] for name, a in seen.items()}
  (alone,), _, _ = methods.round_matrices((w[2],), one, **how)
  np.testing.assert_allclose(dense[2], alone.dense(), atol=1e-5)


def test_first_rules_win_and_embeddings_run_along_their_width():
  model, params = known()
  packed, report = run(
    model,
    params,
    Rule(match="/q$", format=Affine(block=8, bits=8)),
    Rule(match="mlp", format=None),
    Rule(match="layers", format=FORMAT),
    Rule(match="embed", format=Affine(block=16, bits=8)),
    calibration=None,
  )
  layer = next(tree.layers(packed))
  assert layer["attention"]["q"].format.bits == 8
  assert layer["attention"]["k"].format == FORMAT
  assert not weights.is_weight(layer["mlp"]["up"])
  assert packed["embed"].shape == params["embed"].shape
  error = abs(weights.dense(packed["embed"]) - params["embed"]).max()
  assert error < 2 / 255 * float(abs(params["embed"]).max())
  assert len(report.rows) == 3 * 4 + 1
  assert "layers/0/attention/q" in report.table()


def test_few_tokens_are_reported():
  few = dataclasses.replace(CALIBRATION, windows=1)
  rule = dataclasses.replace(BY_GPTQ, match="attention/q$")
  _, report = run(*known(), rule, calibration=few)
  assert any(
    "16 tokens for 32 inputs: damped by 1" in w for w in report.warnings()
  )
  rows = report.as_dict()["matrices"]
  assert rows[0]["damp"] == pytest.approx(1)
  assert report.as_dict()["calibration"]["shape"] == [1, 16]


@pytest.mark.parametrize(
  "given, options, says",
  [
    (
      (Rule(match="z$", format=FORMAT),),
      {},
      "rule 1, 'z\\$', applies to no matrix",
    ),
    ((LAYERS, Rule(match="/q$", format=None)), {}, "rule 2"),
    ((Rule(match="q", format=Affine(block=64)),), {}, "layers/0/attention/q.*"),
    ((BY_GPTQ,), dict(calibration=None), "GPTQ: needs calibration"),
    (
      (Rule(match="embed", format=FORMAT, method=GPTQMethod()),),
      {},
      "embed is packed without calibration",
    ),
    (
      (dataclasses.replace(LAYERS, method=RoundToNearest(weighted=True)),),
      dict(calibration=None),
      "RoundToNearest.weighted: needs calibration",
    ),
    (
      (
        Rule(
          match="q$",
          format=Codebook(block=32),
          method=RoundToNearest(clip=Clip()),
        ),
      ),
      {},
      "RoundToNearest.clip: the grids of nf4-b32-dq are not of a group alone",
    ),
    (
      (
        dataclasses.replace(
          BY_GPTQ, method=GPTQMethod(options=GPTQ(drift=0.5))
        ),
      ),
      dict(sequential="none"),
      "GPTQ.drift",
    ),
  ],
)
def test_bad_rules_raise(given, options, says):
  with pytest.raises(UserError, match=says):
    run(*known(), *given, **options)


def test_adapted_matrices_are_refused():
  model, params = known()
  adapted = Adapt(targets=("q",))(params, jax.random.key(0))
  with pytest.raises(UserError, match="quantize first, then adapt"):
    run(model, adapted, LAYERS, calibration=None)
  with pytest.raises(UserError, match="is no pattern"):
    Rule(match="(", format=None)


def test_stages_are_in_the_order_of_use():
  names = [f"attention/{n}" for n in "kovq"]
  names += ["mlp/down", "mlp/experts/up", "mlp/experts/gate", "mlp/shared/up"]
  assert quantize_by_rules.stages(names) == [
    [["attention/k", "attention/v", "attention/q"]],
    [["attention/o"]],
    [["mlp/experts/up", "mlp/experts/gate"], ["mlp/shared/up"]],
    [["mlp/down"]],
  ]
  assert quantize_by_rules.stages(["x"]) == [[["x"]]]


@pytest.mark.slow
def test_fused_matrices_are_rounded_as_separate_ones():
  _, params = known()
  ws = [params["run0"]["layer0"]["attention"][n][0] for n in "kv"]
  x = np.random.default_rng(0).standard_normal((96, 32)).astype(np.float32)
  seen = dict(xx=jnp.asarray(x.T @ x), n=jnp.full((1,), 96.0))
  how = dict(format=Codebook(block=32), method=GPTQMethod())
  together, _, _ = methods.round_matrices(tuple(ws), seen, **how)
  for w, q in zip(ws, together, strict=True):
    (alone,), _, _ = methods.round_matrices((w,), seen, **how)
    np.testing.assert_allclose(q.dense(), alone.dense(), atol=1e-6)


@pytest.mark.slow
def test_ggml_is_rounded_by_the_c_references_rules():
  _, params = known()
  rule = Rule(match="mlp/up$", format=GGML(kind="Q4_0"))
  packed, _ = run(*known(), rule)
  w = np.asarray(params["run0"]["layer0"]["mlp"]["up"][1])
  want = rule.format.decode(rule.format.encode(w))
  got = weights.dense(packed["run0"]["layer0"]["mlp"]["up"])[1]
  np.testing.assert_array_equal(got, want)
