"""Directories that other tools have quantized: read packed, and written."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import convert as command
from experiments.core import cli
from research import tree, weights
from research.interop import convert, hf, load, quantized, sources
from research.interop.quantized import checkpoint_formats, gptq
from research.interop.quantized.integers import to_integers
from research.io import safetensors, unread
from research.quant import qtensor
from research.quant.formats.affine import Affine
from research.typing import UserError
from tests import support, support_output
from tests.research.interop.test_convert import MODELS, logits
from tests.research.io import test_unread
from tests.support_hf_quant import (
  SQUARE,
  WRITERS,
  change,
  decoded,
  packed_leaves,
  plain,
  raw,
  source,
)

LAYOUT = test_unread.LAYOUTS[1]
"""Where all matrices have one shape, little is compiled."""
every = pytest.mark.parametrize("name", WRITERS)


@every
@pytest.mark.sample(3)
def test_read_packed_and_written_back(name, made, tmp_path):
  folder = made(name, True)
  it = load.load_model(folder)
  found = packed_leaves(it.params)
  assert len(found) == 7
  # All layers stand behind one axis.
  assert {w.lead for w in found} == {(2,)}
  wide = load.load_model(folder, packed=False).params
  assert not packed_leaves(wide)
  chex.assert_trees_all_equal(decoded(it.params), wide)
  again, before = tmp_path / "again", sources.open_source(folder)
  if name == "gptq":  # through our own checkpoint
    convert.to_orbax(before, tmp_path / "ours")
    before = sources.open_source(tmp_path / "ours")
  log = convert.to_quantized(before, again, WRITERS[name])
  assert log.summary()["changed"] == 0
  assert raw(again) == raw(folder)
  both = [f / "config.json" for f in (again, folder)]
  assert both[0].read_text() == both[1].read_text()


def derived(folder, module, bits, awq=False):
  """Returns a matrix `[I, O]` straight from its words."""
  t = {
    k: safetensors.open_directory(folder)[f"{module}.{k}"].read()
    for k in ("qweight", "qzeros", "scales")
  }

  def along_rows(words):
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[:, None]
    x = (words.view(np.uint32)[:, None] >> shifts) & (2**bits - 1)
    return x.reshape(-1, words.shape[1])

  def along_columns(words):
    x = along_rows(np.ascontiguousarray(words.T)).T
    return x.reshape(len(x), -1, 8)[..., [0, 4, 1, 5, 2, 6, 3, 7]] if awq else x

  zero = along_columns(t["qzeros"]).reshape(t["scales"].shape) + (not awq)
  codes = along_columns(t["qweight"]) if awq else along_rows(t["qweight"])
  codes = codes.reshape(-1, zero.shape[1])
  spread = functools.partial(np.repeat, repeats=len(codes) // len(zero), axis=0)
  return spread(t["scales"].astype("f4")) * (codes - spread(zero).astype("f4"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), [("gptq", 4), ("awq", 4)])
@pytest.mark.sample(2)
def test_numbers_are_those_of_the_words(name, bits, made):
  params = load.load_model(made(name)).params
  for i, layer in enumerate(tree.layers(params)):
    for path, theirs in (
      ("attention/k", "self_attn.k_proj"),
      ("mlp/down", "mlp.down_proj"),
    ):
      a, b = path.split("/")
      module = f"model.layers.{i}.{theirs}"
      want = derived(made(name), module, bits, name == "awq")
      np.testing.assert_array_equal(layer[a][b].dense(), want)


@pytest.mark.slow
def test_errors_are_those_of_the_bits(made):
  """Each bit less doubles the error, about."""
  want = plain(True).params()["run0"]["layer0"]["mlp"]["up"]

  def error(name):
    it = load.load_model(made(name, True))
    got = it.params["run0"]["layer0"]["mlp"]["up"]
    return float(jnp.linalg.norm(got.dense() - want) / jnp.linalg.norm(want))

  assert error("gptq") < 0.13 and error("gptq8") < 0.012
  assert 1.7 < error("gptq3") / error("gptq") < 2.6
  assert error("nf4") < error("gptq")


def scattered(params):
  """Returns GPTQ's packed matrices, one layer plain, one act-ordered."""
  rng = np.random.default_rng(0)

  def pack(i, path, w):
    if i == 1 or w.ndim != 2:
      return w
    q = qtensor.pack(w, Affine(block=32, symmetric=True))
    if i == 2:
      order = rng.permutation(q.inputs).astype(np.int32)
      q = qtensor.QTensor(
        q.parts, order, format=q.format, inputs=q.inputs, outputs=q.outputs
      )
    return q

  layers = [
    tree.map_paths(functools.partial(pack, i), layer)
    for i, layer in enumerate(tree.layers(params))
  ]
  return tree.stack(tree.outer_params(params), layers)


@pytest.mark.slow
def test_layers_that_are_not_alike_are_runs_of_their_own(made, tmp_path):
  model = plain().model
  params = scattered(plain().params())
  mixed = source(model, params)
  with pytest.raises(UserError, match="7 of 21 matrices do not fit .*plain"):
    convert.to_quantized(mixed, tmp_path / "no", checkpoint_formats.Gptq())
  assert not (tmp_path / "no").exists()

  def write(tensors):
    # As a tool leaves a layer out.
    for address, part in mixed.parts.items():
      if address.layer is None or len(part.shape) != 2:
        continue
      name, _ = hf.table(model).theirs(address)
      module = name.removesuffix(".weight")
      for k in gptq.NAMES:
        tensors.pop(f"{module}.{k}")
      w = part.read()
      if address.layer == 1:
        tensors[name] = np.ascontiguousarray(np.asarray(w).T)
        continue
      made = gptq.to_tensors(to_integers(w, "w"), 1)
      tensors |= {f"{module}.{k}": x for k, x in made.items()}

  folder = change(made("gptq"), tmp_path / "mixed", write)
  it = load.load_model(folder)
  assert len(tree.runs(it.params)) == 3
  assert len(packed_leaves(it.params)) == 14
  x = support.tokens()
  want = logits(model, decoded(params), x)
  got = logits(it.model, it.params, x)
  chex.assert_trees_all_close(got, want, atol=1e-5 * float(jnp.ptp(want)))
  # A source reads the same.
  again = sources.open_source(folder).params()
  chex.assert_trees_all_equal(again, it.params)


@pytest.mark.slow
def test_experts_are_packed(tmp_path):
  it = load.load_model(MODELS / "mixtral")
  writer = checkpoint_formats.Bnb("int8")
  convert.to_quantized(
    source(it.model, it.params), tmp_path / "q", writer, True
  )
  got = load.load_model(tmp_path / "q").params
  up = got["run0"]["layer0"]["mlp"]["experts"]["up"]
  assert up.shape == it.params["run0"]["layer0"]["mlp"]["experts"]["up"].shape
  assert not weights.is_weight(got["run0"]["layer0"]["mlp"]["router"])
  said = safetensors.read_json(tmp_path / "q" / "config.json")
  skipped = said[quantized.CONFIG]["llm_int8_skip_modules"]
  assert "model.layers.0.block_sparse_moe.gate" in skipped
  wide = load.load_model(tmp_path / "q", packed=False).params
  chex.assert_trees_all_equal(decoded(got), wide)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq", "bnb"])
def test_each_device_reads_its_part(name):
  folder = MODELS.with_name("quantized") / name
  want = load.load_model(folder).params
  for shardings in (test_unread.everywhere, test_unread.by(LAYOUT)):
    got = load.load_model(folder, shardings=shardings).params
    test_unread.same(got, want, shardings)
  shapes = load.load_model(folder, shardings=unread.unplaced).params
  chex.assert_trees_all_equal_shapes(shapes, want)


def test_nothing_is_decoded_and_no_more_held_than_an_array(monkeypatch):
  scratch, made = unread._scratch, []

  def counted(shape, dtype):
    out = scratch(shape, dtype)
    made.append(out.nbytes)
    return out

  def decodes(*_):
    raise AssertionError("decoded")

  monkeypatch.setattr(unread, "_scratch", counted)
  monkeypatch.setattr(quantized.PackedTensor, "read", decodes)
  it = load.load_model(MODELS.with_name("quantized") / "gptq")
  sizes = [x.nbytes for x in jax.tree.leaves(it.params)]
  # Stacked arrays, and those of one layer that go into them.
  assert max(made) == max(sizes) and sum(made) <= 2 * sum(sizes)
  packed = sum(w.nbytes for w in packed_leaves(it.params))
  count = sum(int(np.prod(w.shape)) for w in packed_leaves(it.params))
  # 4 bits, 16 and 4 a group of 16, and 32 an input for its place.
  assert packed == count * (4 + 20 / 16 + 32 / 32) / 8


@pytest.mark.slow
def test_a_packed_head_stays_packed_where_it_can(tmp_path):
  params = dict(plain(True).params())
  head = params["head"][:, :64]
  model = support.model(**SQUARE, vocab=64)
  params |= {"head": qtensor.pack(head, Affine(block=32))}
  params["embed"] = params["embed"][:64]
  before, want = source(model, params), params["head"].dense()

  def head(name):
    said = safetensors.read_json(tmp_path / name / "config.json")
    return (
      load.load_model(tmp_path / name).params["head"],
      said[quantized.CONFIG].get("lm_head", False),
    )

  writer = checkpoint_formats.Gptq(head=True)
  convert.to_quantized(before, tmp_path / "a", writer, True)
  # Of one that came so, the command keeps it so.
  flags = [f"--from={tmp_path / 'a'}", f"--to={tmp_path / 'b'}"]
  assert not cli.call(command.main, ["convert", *flags, "--format=gptq"])
  for name in "ab":
    got, said = head(name)
    assert said and weights.is_weight(got)
    np.testing.assert_array_equal(got.dense(), want)
  # transformers opens neither with a packed head.
  for name, writer in dict(
    c=checkpoint_formats.Gptq(), d=checkpoint_formats.Awq()
  ).items():
    again = sources.open_source(tmp_path / "a")
    convert.to_quantized(again, tmp_path / name, writer)
    got, said = head(name)
    assert not said and not weights.is_weight(got)
    np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_between_tools_without_loss(made, tmp_path):
  def to(name, before, writer):
    log = convert.to_quantized(
      sources.open_source(before), tmp_path / name, writer
    )
    assert log.summary()["changed"] == 0
    return tmp_path / name

  def numbers(folder):
    return load.load_model(folder, packed=False).params

  # Symmetric 4-bit integers are everybody's.
  a = to("a", made("gptq", True), checkpoint_formats.Awq())
  b = to("b", a, checkpoint_formats.Compressed())
  c = to("c", b, checkpoint_formats.Gptq())
  chex.assert_trees_all_equal(numbers(a), numbers(made("gptq", True)))
  assert raw(c) == raw(made("gptq", True))
  # Version 2 has the zeros of 0 that AWQ may have.
  d = to("d", made("awq", True), checkpoint_formats.Gptq())
  said = safetensors.read_json(d / "quantize_config.json")
  assert said["checkpoint_format"] in ("gptq", "gptq_v2")
  assert raw(to("e", d, checkpoint_formats.Awq())) == raw(made("awq", True))
  # Blocks of ggml are groups of 32.
  f = to("f", MODELS / "gguf_q4_0" / "model.gguf", checkpoint_formats.Gptq())
  want = load.load_model(MODELS / "gguf_q4_0" / "model.gguf").params
  chex.assert_trees_all_equal(numbers(f), want)
  # Anybody's numbers are everybody's, decoded.
  convert.to_hf(sources.open_source(d), tmp_path / "wide")
  chex.assert_trees_all_equal(numbers(tmp_path / "wide"), numbers(d))


@pytest.mark.slow
def test_the_command(made, tmp_path, capsys):
  def call(*arguments):
    status = cli.call(command.main, ["convert", *map(str, arguments)])
    out = capsys.readouterr()
    lines = out.out.splitlines()
    result = json.loads(lines[-1]) if lines else None
    return status, result, support_output.errors(out.err)

  status, result, errors = call(
    f"--from={made('gptq', True)}", f"--to={tmp_path / 'a'}", "--format=awq"
  )
  assert (status, errors, result["changed"]) == (0, "", 0)
  status, result, _ = call(
    f"--from={tmp_path / 'a'}",
    f"--to={tmp_path / 'b'}",
    "--format=gptq:8",
    "--requantize",
    "--group_size=16",
  )
  assert (status, result["changed"]) == (0, 14)
  assert 0 < result["max_relative_error"] < 0.01
  for flags, words in (
    (["--format=gptq:5"], "expected one of hf"),
    (["--format=bnb"], "do not fit this format"),
    (["--format=hf", "--requantize"], "--requantize: is for --format=gptq"),
  ):
    status, _, errors = call(
      f"--from={made('gptq', True)}", f"--to={tmp_path / 'c'}", *flags
    )
    assert status and words in errors
