"""compressed-tensors live: it opens what we write, and we what it writes."""

import json

import make_compressed
import make_models
import numpy as np
import pytest
import safetensors.torch
import support
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

CONFIG = dict(
  architectures=["LlamaForCausalLM"],
  model_type="llama",
  vocab_size=67,
  hidden_size=64,
  intermediate_size=96,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=16,
  hidden_act="silu",
  max_position_embeddings=128,
  rms_norm_eps=1e-5,
  rope_theta=500.0,
  tie_word_embeddings=False,
  torch_dtype="float32",
  bos_token_id=1,
  eos_token_id=2,
)
TOKENS = np.random.default_rng(0).integers(3, 67, (2, 20)).astype(np.int32)
OURS = ["int4", "int8", "fp8", "nvfp4", "mxfp4"]

INT = dict(strategy="group", group_size=32)
THEIRS = {  # name -> [(targets, preset or arguments of weights)]
  "w4a16_asym": [(["Linear"], dict(num_bits=4, symmetric=False) | INT)],
  "w3_and_w8": [
    (["re:.*self_attn.*"], dict(num_bits=3) | INT),
    (["re:.*mlp.*"], dict(num_bits=8, strategy="channel")),
  ],
  "fp8_dynamic": [(["Linear"], "FP8_DYNAMIC")],
  "w8a8": [(["Linear"], "W8A8")],
  "fp8_block": [
    (
      ["Linear"],
      make_compressed.FP8 | dict(strategy="block", block_structure=[32, 16]),
    )
  ],
  "nvfp4": [(["Linear"], "NVFP4A16")],
  "mxfp4": [(["Linear"], "MXFP4A16")],
  "mxfp8": [(["Linear"], "MXFP8A16")],
}
ROUNDED = ("fp8_dynamic", "w8a8")
"""What rounds activations as well."""

# Of 8 bits a number half way may fall to either side, a 127th of the largest;
# unrounded activations are 0.044 off there, and 0.19 of FP8's.
# Float32's sums in another order; its NVFP4 decodes to bfloat16.
CLOSE = {"nvfp4": 0.03, "w8a8": 0.02}


def tensors() -> dict[str, torch.Tensor]:
  rng = np.random.default_rng(1)
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(
      make_models.peer_config(CONFIG)
    )
  return {
    name: torch.tensor(
      (1 if name.endswith("norm.weight") else 0)
      + 0.2 * rng.standard_normal(tuple(x.shape)),
      dtype=torch.float32,
    )
    for name, x in model.state_dict().items()
  }


def save(folder, state):
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(CONFIG))
  safetensors.torch.save_file(
    state, folder / "model.safetensors", metadata={"format": "pt"}
  )


def logits(folder, late=False) -> np.ndarray:
  """Returns what transformers computes.

  Args:
    folder: of the model.
    late: whether weights are decoded when they are used, not when they are
      loaded. Loading reads all groups by the first one's scheme; but later,
      floats become bfloat16 in a float32 model, activations are rounded, and
      zero points of groups do not load.
  """
  options = {}
  if "quantization_config" in (folder / "config.json").read_text() and not late:
    options["quantization_config"] = transformers.CompressedTensorsConfig(
      dequantize=True
    )
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, attn_implementation="eager", dtype=torch.float32, **options
  ).eval()
  with torch.no_grad():
    return model(torch.from_numpy(TOKENS).long()).logits.float().numpy()


@pytest.fixture
def plain(tmp_path):
  save(tmp_path / "plain", tensors())
  return tmp_path / "plain"


def test_goldens_are_what_the_packages_make():
  path = make_compressed.pathlib.Path(make_compressed.__file__)
  stored = json.loads(path.with_name("compressed.json").read_text())
  assert json.loads(json.dumps(make_compressed.make())) == stored


@pytest.mark.parametrize("kind", OURS)
def test_transformers_opens_ours(kind, plain, heptad, tmp_path):
  to = tmp_path / "ours"
  heptad.command(
    "convert",
    f"--from={plain}",
    f"--to={to}",
    f"--format=compressed-tensors:{kind}",
    "--requantize",
    "--notypecheck",
  )
  got, ours = logits(to), heptad.bridge("logits", to, tokens=TOKENS)
  assert support.relative_error(got, ours) < CLOSE.get(kind, 1e-5)
  # It is quantized, and not much further off than its bits are.
  off = support.relative_error(ours, logits(plain))
  assert 1e-3 < off < (0.6 if "4" in kind else 0.1)


@pytest.mark.parametrize("name", THEIRS)
def test_we_open_what_it_writes(name, heptad, tmp_path):
  schemes = {}
  for i, (targets, weights) in enumerate(THEIRS[name]):
    if isinstance(weights, str):
      schemes[f"group_{i}"] = preset_name_to_scheme(weights, targets)
    else:
      scheme = make_compressed.scheme_of(weights, None)
      schemes[f"group_{i}"] = scheme.model_copy(update={"targets": targets})
  state = {}
  for key, x in tensors().items():
    module = key.removesuffix(".weight")
    attention = ".self_attn." in key
    if not module.endswith("_proj"):
      state[key] = x
      continue
    chosen = list(schemes.values())[0 if attention else -1]
    chosen.format = infer_module_format(torch.nn.Linear, chosen)
    parts = make_compressed.compressed(x, chosen)
    state |= {f"{module}.{k}": v.contiguous() for k, v in parts.items()}
  formats = {s.format for s in schemes.values()}
  config = QuantizationConfig(
    config_groups=schemes,
    format=formats.pop() if len(formats) == 1 else "mixed-precision",
    quantization_status="compressed",
    ignore=["lm_head"],
  )
  save(tmp_path / "theirs", state)
  ModelCompressor(config).update_config(str(tmp_path / "theirs"))
  late = len(THEIRS[name]) > 1 or name in ROUNDED
  want = logits(tmp_path / "theirs", late=late)
  got = heptad.bridge(
    "logits", tmp_path / "theirs", packed=name in ROUNDED, tokens=TOKENS
  )
  assert support.relative_error(got, want) < CLOSE.get(name, 1e-5)
