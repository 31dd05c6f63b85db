"""bitsandbytes live: transformers opens what we write, and we what it writes.

Both are compared decoded: its products on CPUs round to bfloat16. Its decoder
there is wrong where blocks run across rows (0.50: rows of 96, blocks of 64), so
that rows here are whole blocks.
"""

import numpy as np
import pytest
import safetensors.numpy
import support
import test_compressed
import torch
import transformers
from bitsandbytes import functional

KINDS = ["nf4", "fp4", "int8"]
TOKENS = test_compressed.TOKENS


@pytest.fixture
def plain(tmp_path, monkeypatch):
  monkeypatch.setitem(test_compressed.CONFIG, "intermediate_size", 128)
  test_compressed.save(tmp_path / "plain", test_compressed.tensors())
  return tmp_path / "plain"


def opened(folder, **options):
  return transformers.AutoModelForCausalLM.from_pretrained(
    folder,
    attn_implementation="eager",
    dtype=torch.float32,
    device_map="cpu",
    **options,
  ).eval()


def logits(model):
  with torch.no_grad():
    return model(torch.from_numpy(TOKENS).long()).logits.float().numpy()


def quantized(kind):
  if kind == "int8":
    return transformers.BitsAndBytesConfig(load_in_8bit=True)
  return transformers.BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type=kind,
    bnb_4bit_use_double_quant=kind == "nf4",
    bnb_4bit_compute_dtype=torch.float32,
  )


def is_close(kind, got, want):
  # Its 8-bit products were made for float16, in which it decodes.
  tolerance = 2e-3 if kind == "int8" else 1e-5
  assert support.relative_error(got, want) < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_ours(kind, plain, heptad, tmp_path):
  to = tmp_path / "ours"
  heptad.command(
    "convert",
    f"--from={plain}",
    f"--to={to}",
    f"--format=bnb:{kind}",
    "--requantize",
    "--notypecheck",
  )
  model = opened(to)
  assert model.is_loaded_in_8bit if kind == "int8" else model.is_loaded_in_4bit
  # Decoded, as its products round inputs in 8 bits.
  ours = heptad.bridge("logits", to, packed=kind != "int8", tokens=TOKENS)
  is_close(kind, logits(model.dequantize()), ours)
  # It is quantized, and not much further off than its bits are.
  off = support.relative_error(ours, logits(opened(plain)))
  assert 1e-3 < off < (0.1 if kind == "int8" else 0.6)


@pytest.mark.parametrize("kind", KINDS)
def test_we_open_what_it_writes(kind, plain, heptad, tmp_path):
  model = opened(plain, quantization_config=quantized(kind))
  model.save_pretrained(tmp_path / "theirs")
  ours = heptad.bridge(
    "logits", tmp_path / "theirs", packed=kind != "int8", tokens=TOKENS
  )
  is_close(kind, ours, logits(opened(tmp_path / "theirs").dequantize()))
  # Written back, every tensor is what it was.
  heptad.command(
    "convert",
    f"--from={tmp_path / 'theirs'}",
    f"--to={tmp_path / 'again'}",
    "--format=bnb",
    "--notypecheck",
  )
  want, got = (
    safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
    for name in ("theirs", "again")
  )
  assert set(got) == set(want)
  for name, x in want.items():
    if "quant_state" not in name:
      np.testing.assert_array_equal(got[name], x, name)


PRODUCTS = """
import sys
import jax
import numpy as np
from research import weights
from research.interop import load

folder, given, out = sys.argv[1:]
params = load.load_model(folder).params
inputs, products = np.load(given), {}
for path, w in weights.named_weights(params):
  run, _, part, name = (path.split("/") + 3 * [""])[:4]
  if part not in ("attention", "mlp") or not weights.is_weight(w):
    continue
  part = "self_attn" if part == "attention" else part
  for i in range(w.shape[0]):
    module = f"model.layers.{i}.{part}.{name}_proj"
    layer = jax.tree.map(lambda x: x[i], w)
    products[module] = weights.einsum("...d,df->...f", inputs[module], layer)
np.savez(out, **products)
"""


@pytest.mark.parametrize("threshold", [6.0, 1.0, 0.0])
def test_eight_bits_round_inputs_as_it_does(threshold, plain, heptad, tmp_path):
  """LLM.int8: inputs in 8 bits, apart from those with outliers."""
  config = transformers.BitsAndBytesConfig(
    load_in_8bit=True, llm_int8_threshold=threshold
  )
  folder = tmp_path / "theirs"
  opened(plain, quantization_config=config).save_pretrained(folder)
  model, inputs, want = opened(folder), {}, {}

  def watch(name):
    def hook(module, given, out):
      inputs[name] = given[0].numpy()
      want[name] = out.reshape(*given[0].shape[:-1], -1).numpy()

    return hook

  for name, module in model.named_modules():
    if type(module).__name__ == "Linear8bitLt":
      module.register_forward_hook(watch(name))
  whole = logits(model)
  np.savez(tmp_path / "inputs.npz", **inputs)
  heptad.script(
    PRODUCTS, folder, tmp_path / "inputs.npz", tmp_path / "products.npz"
  )
  products = np.load(tmp_path / "products.npz")
  assert set(products) == set(want) and len(want) == 14
  for name, y in want.items():
    # Its constant on CPUs, 6.200124e-05, is 1.8e-5 off 1 / 127^2.
    assert np.abs(products[name] - y).max() < 3e-5 * np.abs(y).max(), name
  # Of the whole model that moves numbers half way to their other neighbour, a
  # 127th of a token's largest; weights alone are off for every number.
  ours, alone = (
    heptad.bridge("logits", folder, packed=packed, tokens=TOKENS)
    for packed in (True, False)
  )
  errors = [np.square(x - whole).mean() ** 0.5 for x in (ours, alone)]
  assert errors[0] < 0.5 * errors[1]


def test_int8_codes_and_numbers_are_its():
  x = torch.tensor(np.random.default_rng(0).standard_normal((24, 64)))
  x = x.to(torch.float16)
  codes, magnitudes, _ = functional.int8_vectorwise_quant(x)
  wide = functional.int8_vectorwise_dequant(codes, magnitudes)
  top = x.float().abs().amax(1)
  assert torch.equal(magnitudes, top)
  off = (codes.float() - x.float() * (127 / top)[:, None]).abs().max()
  assert off <= 0.5 + 127 * 2**-11  # its product is in float16
  step = np.float32(7.874015718698502e-3)
  want = codes.numpy().astype("f4") * top.numpy()[:, None] * step
  np.testing.assert_array_equal(wide.numpy(), want)
