"""Writes the tiny models of every family and what transformers says of them.

  .venv-peers/bin/python tests/golden/make_models.py [--to DIR] [NAME ...]

For each family: config.json, model.safetensors (some sharded) and golden.npz:

  tokens          int32 [3, T]   row 0 full, row 1 left-, row 2 right-padded
  attention_mask  int32 [3, T]   1 where a token counts
  positions       int32 [3, T]   -1 at padding
  logits          fp32 [3, T, V] computed in fp64, rounded; 0 at padding
  fp32_error      fp32           largest error of transformers' own fp32 run
                                 over the range of the logits
  prompt, greedy  int32 [8], [64]  greedy continuation with the KV cache
  greedy_full     int32 [64]     the same with a full forward pass a token
  greedy_margin   fp32           smallest gap between the best two logits

Only NumPy draws numbers, so the weights do not depend on torch's version.
"""

import argparse
import contextlib
import json
import pathlib
import sys
import zlib

import numpy as np
import safetensors.numpy
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import families  # noqa: E402

MODELS = pathlib.Path(__file__).parent / "models"
GREEDY = 64
PROMPT = 8


@contextlib.contextmanager
def float64():
  """Makes transformers' explicit up-casts to fp32 casts to fp64.

  Norms, softmax and rotary tables say `.to(torch.float32)` in every model;
  without this a model in double precision still rounds to single inside.
  """
  float32, cast = torch.float32, torch.Tensor.float
  torch.float32 = torch.float = torch.float64
  torch.Tensor.float = torch.Tensor.double
  try:
    yield
  finally:
    torch.float32 = torch.float = float32
    torch.Tensor.float = cast


def peer_config(config: dict) -> transformers.PretrainedConfig:
  """Returns transformers' config object of a config.json's dict."""
  rest = {k: v for k, v in config.items() if k != "model_type"}
  return transformers.AutoConfig.for_model(config["model_type"], **rest)


def _draw(name, shape, family, generator):
  if name.endswith("norm.weight"):
    return family.norm_offset + 0.2 * generator.standard_normal(shape)
  if name.endswith("bias"):
    return 0.2 * generator.standard_normal(shape)
  if name.endswith("embed_tokens.weight"):
    return family.embed_std * generator.standard_normal(shape)
  return 0.3 * generator.standard_normal(shape)


def weights(family: families.Family) -> dict[str, np.ndarray]:
  """Returns the family's random weights under their names in the file."""
  with torch.device("meta"):
    model = transformers.AutoModelForCausalLM.from_config(
      peer_config(family.config)
    )
  tied = family.config["tie_word_embeddings"]
  out = {}
  for name, value in model.state_dict().items():
    if tied and name == "lm_head.weight":
      continue
    generator = np.random.default_rng([family.seed, zlib.crc32(name.encode())])
    drawn = _draw(name, tuple(value.shape), family, generator)
    out[name] = drawn.astype(np.float32)
  return out


def plain(config: dict) -> dict[str, str]:
  """Returns which of transformers' implementations say what they compute."""
  how = dict(attn_implementation="eager")
  if "num_experts_per_tok" in config:
    # A loop; grouped matmuls have no double precision and no odd widths.
    how["experts_implementation"] = "eager"
  return how


def build(config: dict, tensors: dict, dtype=torch.float32):
  """Returns transformers' model of a config and weights, in eval mode."""
  parsed = peer_config(config)
  model = transformers.AutoModelForCausalLM.from_config(
    parsed, **plain(config)
  ).to(dtype)
  state = {k: torch.from_numpy(np.array(v)) for k, v in tensors.items()}
  missing, extra = model.load_state_dict(state, strict=False)
  allowed = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
  if set(missing) - allowed or extra:
    raise ValueError(f"missing {missing}, superfluous {extra}")
  model.tie_weights()
  return model.eval()


def text(length: int) -> dict[str, np.ndarray]:
  """Returns three rows of tokens: full, left-padded, right-padded."""
  generator = np.random.default_rng(7)
  tokens = generator.integers(3, families.VOCAB, (3, length))
  mask = np.ones((3, length), np.int32)
  mask[1, :5] = 0
  mask[2, -6:] = 0
  tokens = np.where(mask == 1, tokens, 0).astype(np.int32)
  positions = np.where(mask == 1, mask.cumsum(1) - 1, -1).astype(np.int32)
  return dict(tokens=tokens, attention_mask=mask, positions=positions)


@torch.no_grad()
def logits(model, rows: dict[str, np.ndarray]) -> np.ndarray:
  """Returns [B, T, V] logits, zero where the mask is zero.

  Each row alone and the shortest first: under dynamic RoPE scaling
  transformers rotates a batch by its longest row, and by the longest sequence
  it has seen before; a row should not depend on its company.
  """
  tokens = torch.from_numpy(rows["tokens"]).long()
  mask = torch.from_numpy(rows["attention_mask"]).long()
  places = torch.from_numpy(rows["positions"]).long().clamp(min=0)
  out = {}
  for i in places.amax(1).argsort().tolist():
    one = slice(i, i + 1)
    out[i] = model(
      input_ids=tokens[one],
      attention_mask=mask[one],
      position_ids=places[one],
    ).logits
  whole = torch.cat([out[i] for i in range(len(tokens))])
  return whole.double().numpy() * rows["attention_mask"][..., None]


@torch.no_grad()
def greedy(model, prompt: np.ndarray, steps: int = GREEDY) -> np.ndarray:
  """Returns the continuation by transformers' own `generate`, with cache."""
  ids = torch.from_numpy(prompt).long()[None]
  model.generation_config.eos_token_id = None  # never stop early
  out = model.generate(
    ids,
    attention_mask=torch.ones_like(ids),
    generation_config=transformers.GenerationConfig(
      max_new_tokens=steps, do_sample=False, use_cache=True, pad_token_id=0
    ),
  )
  return out[0, len(prompt) :].numpy().astype(np.int32)


@torch.no_grad()
def greedy_full(model, prompt: np.ndarray, steps: int = GREEDY):
  """Returns (continuation, smallest best-two gap) by full forward passes."""
  ids, margin = list(prompt), np.inf
  for _ in range(steps):
    last = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    best = last.topk(2)
    margin = min(margin, float(best.values[0] - best.values[1]))
    ids.append(int(best.indices[0]))
  return np.array(ids[len(prompt) :], np.int32), margin


def golden(config: dict, tensors: dict, length: int) -> dict[str, np.ndarray]:
  """Returns the arrays of golden.npz for one model."""
  rows = text(length)
  prompt = rows["tokens"][0, :PROMPT]
  with float64():
    exact = build(config, tensors, torch.float64)
    truth = logits(exact, rows)
  single = build(config, tensors)
  span = truth.max() - truth.min()
  error = np.abs(logits(single, rows) - truth).max() / span
  continuation = greedy(single, prompt)
  full, margin = greedy_full(single, prompt)
  if margin < 5e-4 * span:
    raise ValueError(f"greedy decoding is a near tie ({margin}): change seed")
  return rows | dict(
    logits=truth.astype(np.float32),
    fp32_error=np.float32(error),
    prompt=prompt,
    greedy=continuation,
    greedy_full=full,
    greedy_margin=np.float32(margin),
  )


def one_by_one(config: dict, tensors: dict) -> dict[str, np.ndarray]:
  """Returns tensors with stacked experts under the names of the Hub's files."""
  mixtral = config["model_type"] == "mixtral"
  names = (
    ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
  )
  out = {}
  for name, value in tensors.items():
    head, inside, last = name.partition(".mlp.experts.")
    if mixtral:
      name = name.replace(".mlp.", ".block_sparse_moe.")
      inside = inside.replace(".mlp.", ".block_sparse_moe.")
    if not last:
      out[name] = value
      continue
    for e, matrix in enumerate(value):
      parts = [matrix]
      if last == "gate_up_proj":
        parts = np.split(matrix, 2)
      for part, theirs in zip(
        parts, names[:2] if parts[1:] else names[2:], strict=True
      ):
        out[f"{head}{inside}{e}.{theirs}.weight"] = np.ascontiguousarray(part)
  return out


def save(folder: pathlib.Path, family: families.Family, tensors: dict) -> None:
  """Writes config.json and the (sharded) safetensors files of a model."""
  folder.mkdir(parents=True, exist_ok=True)
  config = family.config
  if not family.stacked:
    tensors = one_by_one(config, tensors)
  if family.saved_by_peer:
    parsed = peer_config(config)
    parsed.dtype = "float32"
    config = json.loads(parsed.to_json_string())
    config.pop("transformers_version", None)
  (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
  meta = {"format": "pt"}
  if family.shards == 1:
    safetensors.numpy.save_file(
      tensors, folder / "model.safetensors", metadata=meta
    )
    return
  names, where = sorted(tensors), {}
  for i in range(family.shards):
    file = f"model-{i + 1:05d}-of-{family.shards:05d}.safetensors"
    part = {n: tensors[n] for n in names[i :: family.shards]}
    safetensors.numpy.save_file(part, folder / file, metadata=meta)
    where |= dict.fromkeys(part, file)
  index = dict(
    metadata=dict(total_size=sum(v.nbytes for v in tensors.values())),
    weight_map=dict(sorted(where.items())),
  )
  (folder / "model.safetensors.index.json").write_text(
    json.dumps(index, indent=2) + "\n"
  )


def make(name: str, to: pathlib.Path = MODELS) -> dict[str, np.ndarray]:
  """Writes one family's folder; returns its golden arrays."""
  family = families.FAMILIES[name]
  tensors = weights(family)
  save(to / name, family, tensors)
  arrays = golden(family.config, tensors, family.length)
  np.savez_compressed(to / name / "golden.npz", **arrays)
  return arrays


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("names", nargs="*", default=None)
  parser.add_argument("--to", type=pathlib.Path, default=MODELS)
  args = parser.parse_args()
  torch.set_num_threads(1)
  for name in args.names or families.FAMILIES:
    arrays = make(name, args.to)
    same = (arrays["greedy"] == arrays["greedy_full"]).all()
    print(
      f"{name}: fp32 error {arrays['fp32_error']:.1e} of the range, "
      f"margin {arrays['greedy_margin']:.1e}, cached = full: {same}"
    )


if __name__ == "__main__":
  main()
