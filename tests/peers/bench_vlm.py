"""SmolVLM forward and training, ours against transformers, the same weights.

  make bench ARGS='vlm_forward vlm_train --repeats=3'
  .venv-peers/bin/python tests/peers/bench_vlm.py make DIR
  .venv/bin/python tests/peers/bench_vlm.py ours ROW DIR
  .venv-peers/bin/python tests/peers/bench_vlm.py torch ROW DIR

SmolVLM-256M with a third of its layers (4 of SigLIP's 12, 10 of SmolLM2's 30)
and its own widths and vocabulary, random, in fp32, on 2 threads. Two rows, each
with an image in five views of 256 pixels (16 soft tokens a view) and 48 tokens
of text. Forward: logits of all tokens. Training: whole AdamW steps of all
weights, the loss of the text's tokens. Both sides say their loss, which has to
agree. Each measurement is a process of its own, and the sides alternate.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROWS = ("vlm_forward", "vlm_train")
GOAL = 1.5
ROWS_IN_BATCH, VIEWS, SIDE, PER_VIEW, TEXT = 2, 5, 256, 16, 48
IMAGE, VOCAB = 49_190, 49_280
RUNS, RATE = 5, 1e-4
AGREE = 1e-3
"""Relative difference of the losses of both sides, at most."""


def batch() -> dict:
  """Returns pixels `[B, V, H, W, 3]`, uint8, and tokens `[B, T]`."""
  import numpy as np

  rng = np.random.default_rng(0)
  shape = (ROWS_IN_BATCH, VIEWS, SIDE, SIDE, 3)
  soft = np.full((ROWS_IN_BATCH, VIEWS * PER_VIEW), IMAGE)
  text = rng.integers(3, 49_000, (ROWS_IN_BATCH, TEXT))
  return dict(
    pixels=rng.integers(0, 256, shape, np.uint8),
    tokens=np.concatenate([soft, text], axis=1).astype(np.int32),
  )


def timed(work) -> dict:
  """Returns seconds of a call, the median of some, and what the first said."""
  import timing

  first = work()
  seconds = timing.median_seconds(work, RUNS)
  return dict(seconds=seconds, loss=float(first))


def make(folder: str) -> None:
  """Writes the model, by transformers."""
  import torch
  import transformers

  torch.manual_seed(0)
  config = transformers.SmolVLMConfig(
    vision_config=dict(
      model_type="smolvlm_vision", hidden_size=768, intermediate_size=3072,
      num_hidden_layers=4, num_attention_heads=12, image_size=SIDE,
      patch_size=16,
    ),
    text_config=dict(
      model_type="llama", vocab_size=VOCAB, hidden_size=576,
      intermediate_size=1536, num_hidden_layers=10, num_attention_heads=9,
      num_key_value_heads=3, head_dim=64, rope_theta=100_000.0,
      max_position_embeddings=8192, tie_word_embeddings=False, pad_token_id=2,
      bos_token_id=1, eos_token_id=49_279,
    ),
    image_token_id=IMAGE, scale_factor=4, tie_word_embeddings=False,
    pad_token_id=2,
  )  # fmt: skip
  model = transformers.SmolVLMForConditionalGeneration(config)
  model.save_pretrained(folder)


def theirs(row: str, folder: str) -> dict:
  """Returns what transformers takes for a row."""
  import torch
  import transformers

  torch.set_num_threads(2)
  model = transformers.SmolVLMForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="sdpa"
  )
  made = batch()
  pixels = torch.from_numpy(made["pixels"]).permute(0, 1, 4, 2, 3)
  pixels = (pixels.float() / 255 - 0.5) / 0.5
  tokens = torch.from_numpy(made["tokens"]).long()
  labels = torch.where(tokens == IMAGE, -100, tokens)
  inputs = dict(
    input_ids=tokens,
    attention_mask=torch.ones_like(tokens),
    pixel_values=pixels,
    use_cache=False,
  )
  if row == "vlm_forward":
    model.eval()

    @torch.inference_mode()
    def forward():
      logits = model(**inputs).logits[:, :-1].float()
      return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten()
      )

    return timed(forward)
  model.train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)

  def step():
    optimizer.zero_grad(set_to_none=True)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    optimizer.step()
    return loss.detach()

  return timed(step)


def ours(row: str, folder: str) -> dict:
  """Returns what we take for a row."""
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
  import jax
  import numpy as np

  from research.interop.load import load_model
  from research.optim import optim
  from research.training import aot, state, step
  from research.vlm import objective

  loaded = load_model(folder, towers="all")
  model = loaded.model.clone(remat="names")
  made = batch()
  tokens = made["tokens"]
  length = tokens.shape[1]
  at = np.arange(length, dtype=np.int32)
  targets = np.roll(tokens, -1, axis=1)
  learned = (targets != IMAGE) & (at < length - 1)
  rows = dict(
    tokens=tokens,
    targets=targets,
    weights=learned.astype(np.float32),
    positions=np.broadcast_to(at, tokens.shape),
    segments=np.zeros_like(tokens),
    pixels=made["pixels"],
  )
  loss, key = objective.WithImages(model), jax.random.key(0)
  if row == "vlm_forward":
    params = jax.device_put(loaded.params)

    @jax.jit
    def forward(params, rows):
      # Logits of all tokens, as transformers' forward makes them.
      sees = model.with_images(params, rows["pixels"])
      language = model.language
      hidden, _ = language.apply({"params": sees}, rows["tokens"])
      own = {"params": params["language"]}
      logits = language.apply(own, hidden, method="logits")
      nll = jax.nn.logsumexp(logits, axis=-1) - jax.numpy.take_along_axis(
        logits, rows["targets"][..., None], axis=-1
      ).squeeze(-1)
      return (nll * rows["weights"]).sum() / rows["weights"].sum()

    return timed(lambda: jax.block_until_ready(forward(params, rows)))
  tx = optim.adamw(RATE, weight_decay=0.01, clip=None)
  start = state.create(loaded.params, ".", tx)
  run, _ = aot.compile_step(step.make_train_step(loss, tx), start, rows, key)
  frozen, now = start.frozen, dataclasses.replace(start, frozen=None)

  def one():
    nonlocal now
    now, metrics = run(now, frozen, rows, key)
    return float(metrics["loss"])

  return timed(one)


def once(python: str, side: str, row: str, folder: str) -> dict:
  """Returns what a process of its own measured."""
  command = [python, "-W", "ignore", __file__, side, row, folder]
  environment = dict(os.environ)
  done = subprocess.run(
    command, stdout=subprocess.PIPE, text=True, env=environment
  )
  if done.returncode:
    raise SystemExit(f"{row}, {side}: exit {done.returncode}")
  return json.loads(done.stdout.strip().splitlines()[-1])


def rows(names: list[str], peers: str, repeats: int) -> list[dict]:
  """Returns what each row's processes measured.

  Args:
    names: of `ROWS`.
    peers: their Python.
    repeats: rounds.
  """
  import tempfile

  found = []
  with tempfile.TemporaryDirectory() as folder:
    subprocess.run(
      [peers, "-W", "ignore", __file__, "make", folder], check=True
    )
    for row in names:
      rounds = []
      for _ in range(repeats):
        pythons = {"ours": sys.executable, "torch": peers}
        one = {k: once(v, k, row, folder) for k, v in pythons.items()}
        print(f"  {row}: {one}", file=sys.stderr, flush=True)
        rounds.append(one)
      losses = [x["loss"] for one in rounds for x in one.values()]
      if max(losses) - min(losses) > AGREE * abs(losses[0]):
        raise SystemExit(f"{row}: the sides' losses differ: {losses}")
      ratios = [x["torch"]["seconds"] / x["ours"]["seconds"] for x in rounds]
      found.append(
        {
          "row": row,
          "ours": statistics.median(x["ours"]["seconds"] for x in rounds),
          "torch": statistics.median(x["torch"]["seconds"] for x in rounds),
          "ratio": statistics.median(ratios),
          "spread": (min(ratios), max(ratios)),
          "goal": GOAL,
        }
      )
  return found


def show(found: list[dict]) -> str:
  """Returns the table as Markdown; ratios are theirs over ours."""
  lines = [
    "| row | ours s | transformers s | ratio (min..max) | goal |",
    "| --- | --- | --- | --- | --- |",
  ]
  for r in found:
    low, high = r["spread"]
    lines.append(
      f"| {r['row']} | {r['ours']:.3f} | {r['torch']:.3f} |"
      f" {r['ratio']:.2f} ({low:.2f}..{high:.2f}) | {r['goal']:g} |"
    )
  return "\n".join(lines)


def main() -> None:
  side, *rest = sys.argv[1:]
  if side == "make":
    make(*rest)
  else:
    print(json.dumps((ours if side == "ours" else theirs)(*rest)))


if __name__ == "__main__":
  main()
