"""Sums and conversions of adapters, and GGUF's, against PEFT and gguf-py."""

import families
import gguf
import make_models
import make_peft
import numpy as np
import peft
import pytest
import torch

MODELS = make_models.MODELS
WEIGHTS = [0.7, -0.4]
OPTIONS = {
  "one": dict(r=4, lora_alpha=12),
  "two": dict(r=4, lora_alpha=6, use_rslora=True),
  "wide": dict(r=6, lora_alpha=5),
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def base():
  family = families.FAMILIES[make_peft.BASE]
  return make_models.build(family.config, make_models.weights(family))


def drawn(model, seed, std=0.25):
  rng = np.random.default_rng(seed)
  for _, value in sorted(model.named_parameters(), key=lambda x: x[0]):
    if value.requires_grad:
      new = std * rng.standard_normal(tuple(value.shape))
      value.data.copy_(torch.from_numpy(new.astype(np.float32)))
  return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """Adapters as PEFT saves them, by name."""
  folder = tmp_path_factory.mktemp("adapters")
  for i, (name, options) in enumerate(OPTIONS.items()):
    config = peft.LoraConfig(
      target_modules=TARGETS, task_type="CAUSAL_LM", **options
    )
    model = drawn(peft.get_peft_model(base(), config), i)
    model.peft_config["default"].base_model_name_or_path = str(
      MODELS / make_peft.BASE
    )
    model.save_pretrained(folder / name)
  return folder


def deltas(model, adapter="default"):
  """Returns each module's update under one adapter."""
  return {
    name: module.get_delta_weight(adapter).detach().numpy()
    for name, module in model.named_modules()
    if hasattr(module, "get_delta_weight")
  }


def theirs(saved, names):
  model = peft.PeftModel.from_pretrained(base(), saved / names[0], names[0])
  for name in names[1:]:
    model.load_adapter(saved / name, name)
  return model


def ours(heptad, to, op, folders, *options):
  heptad.command(
    "adapters",
    *(f"--op={op}", f"--to={to}", "--notypecheck"),
    *(f"--from={folder}" for folder in folders),
    *options,
  )
  return deltas(peft.PeftModel.from_pretrained(base(), to))


def assert_same(got, want, tolerance=1e-5):
  assert set(got) == set(want)
  for name, value in want.items():
    error = np.abs(got[name] - value).max() / np.abs(value).max()
    assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
  "op, names, elect",
  [
    ("cat", ("one", "wide"), "total"),
    ("svd", ("one", "wide"), "total"),
    ("linear", ("one", "two"), "total"),
    ("ties", ("one", "two"), "total"),
    ("ties", ("one", "two"), "frequency"),
    ("ties_svd", ("one", "wide"), "total"),
    ("magnitude_prune", ("one", "two"), "total"),
    ("magnitude_prune_svd", ("one", "wide"), "total"),
  ],
)
def test_sums_are_pefts(op, names, elect, heptad, saved, tmp_path):
  model = theirs(saved, names)
  model.add_weighted_adapter(
    list(names), WEIGHTS, "sum", op, density=0.4, majority_sign_method=elect
  )
  # Ours refuses options that have no effect.
  options = [] if op in ("cat", "svd", "linear") else ["--density=0.4"]
  options += [f"--elect={elect}"] if op.startswith("ties") else []
  got = ours(
    heptad,
    tmp_path / "sum",
    op,
    [saved / name for name in names],
    *(f"--weight={w}" for w in WEIGHTS),
    *options,
  )
  assert_same(got, deltas(model, "sum"))


@pytest.mark.parametrize("op", ["dare_linear", "dare_ties"])
def test_random_sums_have_pefts_distribution(op, heptad, saved, tmp_path):
  """Entries take the same few values, about as often."""
  names, density = ["one", "two"], 0.5
  model = theirs(saved, names)
  torch.manual_seed(0)
  model.add_weighted_adapter(names, WEIGHTS, "sum", op, density=density)
  to = tmp_path / "sum"
  ours(
    heptad,
    to,
    op,
    [saved / name for name in names],
    *(f"--weight={w}" for w in WEIGHTS),
    f"--density={density}",
  )
  mine = peft.PeftModel.from_pretrained(base(), to)
  shares = {}
  for who, it, adapter in (("ours", mine, "default"), ("peft", model, "sum")):
    kinds = np.zeros(4)
    for name, module in it.named_modules():
      if not hasattr(module, "get_delta_weight"):
        continue
      got = module.lora_A[adapter].weight.detach().numpy()
      source = model.get_submodule(name)
      parts = []
      for key, w in zip(names, WEIGHTS, strict=True):
        root = np.sign(w) * abs(w * source.scaling[key]) ** 0.5
        raw = source.lora_A[key].weight.detach().numpy() / density
        parts.append((raw, root * raw))
      kinds += counted(op, got, parts)
    shares[who] = kinds / kinds.sum()
  # Some 500 entries a side: four deviations of a share of a quarter.
  assert np.abs(shares["ours"] - shares["peft"]).max() < 0.1, shares


def counted(op, got, parts):
  """Counts entries of which neither, one, the other, or both are left."""
  (x, u), (y, v) = parts
  both = u + v
  if op == "dare_ties":
    sign = np.where(x + y >= 0, 1, -1)
    agree = np.stack([np.sign(x) == sign, np.sign(y) == sign])
    both = (u * agree[0] + v * agree[1]) / np.maximum(agree.sum(0), 1)
  near = np.stack([np.abs(got - z) for z in (0 * u, u, v, both)])
  assert near.min(0).max() < 1e-5
  return np.bincount(near.argmin(0).reshape(-1), minlength=4)


CONFIGS = {
  "vera": peft.VeraConfig(r=8),
  "loha": peft.LoHaConfig(r=2, alpha=3),
  "lokr": peft.LoKrConfig(r=2, alpha=6),
  "miss": peft.MissConfig(r=4),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [3, 0.9])
def test_conversion_is_pefts(name, size, heptad, tmp_path):
  config = CONFIGS[name]
  config.target_modules, config.task_type = set(TARGETS), "CAUSAL_LM"
  model = drawn(peft.get_peft_model(base(), config), 5, 0.5)
  config = model.peft_config["default"]
  config.base_model_name_or_path = str(MODELS / make_peft.BASE)
  model.save_pretrained(tmp_path / "a")
  flag = f"--rank={size}" if isinstance(size, int) else f"--energy={size}"
  got = ours(heptad, tmp_path / "ours", "lora", [tmp_path / "a"], flag)
  if name == "miss":  # exact there, whatever was asked for
    want = {}
    for key, module in model.named_modules():
      if not hasattr(module, "get_delta_weight_miss"):
        continue
      w = module.get_base_layer().weight.detach()
      x = (module.get_delta_weight_miss("default", w) - w).detach().numpy()
      u, s, v = np.linalg.svd(x, full_matrices=False)
      total = np.cumsum(s**2) / (s**2).sum()
      r = size if isinstance(size, int) else int((total < size).sum()) + 1
      want[key] = (u[:, :r] * s[:r]) @ v[:r]
    assert_same(got, want, 1e-4)
    return
  peft.save_as_lora(tmp_path / "theirs", model, rank=size)
  want = deltas(peft.PeftModel.from_pretrained(base(), tmp_path / "theirs"))
  assert_same(got, want, 1e-4)


def test_intruders_are_weakened_as_pefts(heptad, saved, tmp_path):
  from peft.tuners.lora.intruders import reduce_intruder_dimension

  model = peft.PeftModel.from_pretrained(base(), saved / "one")
  options = dict(top_k=10, threshold_epsilon=0.9, mitigation_lambda=0.5)
  lines = []
  reduce_intruder_dimension(model, logging_sink=lines.append, **options)
  assert any("Intruders:" in line for line in lines)
  got = ours(
    heptad,
    tmp_path / "o",
    "intruders",
    [saved / "one"],
    *("--top=10", "--threshold=0.9", "--strength=0.5"),
  )
  assert_same(got, deltas(model, "intruder_reduced"), 1e-4)


@pytest.mark.parametrize("name", OPTIONS)
def test_gguf_adapters_are_read_by_gguf_py(name, heptad, saved, tmp_path):
  """What llama.cpp adds, in its order of rows, is what PEFT adds."""
  file = tmp_path / "a.gguf"
  heptad.command(
    "convert",
    *(f"--from={saved / name}", f"--to={file}", "--format=gguf-adapter"),
    "--notypecheck",
  )
  reader = gguf.GGUFReader(file)
  keys = {k: reader.get_field(k).contents() for k in reader.fields}
  assert keys[gguf.Keys.General.TYPE] == gguf.GGUFType.ADAPTER
  assert keys[gguf.Keys.General.ARCHITECTURE] == "llama"
  assert keys[gguf.Keys.Adapter.TYPE] == "lora"
  alpha = keys[gguf.Keys.Adapter.LORA_ALPHA]
  tensors = {t.name: np.array(t.data) for t in reader.tensors}
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)
  model = theirs(saved, [name])
  config = families.FAMILIES[make_peft.BASE].config
  for module, want in deltas(model, name).items():
    short = module.removeprefix("base_model.model.")
    key = names.get_name(f"{short}.weight", (".weight",))
    a, b = tensors[f"{key}.lora_a"], tensors[f"{key}.lora_b"]
    if short.endswith("q_proj"):  # as convert_hf_to_gguf permutes it
      heads = config["num_attention_heads"]
      want = want.reshape(heads, 2, -1, want.shape[1]).swapaxes(1, 2)
      want = want.reshape(-1, a.shape[1])
    error = np.abs(alpha / b.shape[1] * b @ a - want).max()
    assert error < 1e-5 * np.abs(want).max(), short
