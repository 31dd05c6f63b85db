"""SmolVLM forward and training, ours against transformers, the same weights.

  make bench ARGS='vlm_forward vlm_train vlm_forward_tiny vlm_train_tiny'
  .venv-peers/bin/python tests/bench/bench_vlm.py make DIR SIZE
  .venv/bin/python tests/bench/bench_vlm.py ours ROW DIR
  .venv-peers/bin/python tests/bench/bench_vlm.py torch ROW DIR

Two sizes of `SIZES`, random, in fp32, on 2 threads: a third of SmolVLM-256M,
where both sides multiply matrices nearly all the time, and a tiny model, where
what is around them counts. Two rows, each with an image in five views and 48
tokens of text. Forward: logits of all tokens. Training: whole AdamW steps of
all weights, the loss of the text's tokens. Both sides say their loss, which has
to agree. Each measurement is a process of its own, and the sides alternate.

The limit is what our side would need if all its FLOPs, without recomputation,
ran at the rate of one large matrix product: no ratio can exceed theirs over it.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROWS = ("vlm_forward", "vlm_train", "vlm_forward_tiny", "vlm_train_tiny")
GOAL = 1.5
ROWS_IN_BATCH, VIEWS, TEXT = 2, 5, 48
RATE = 1e-4
RUNS = {"third": 5, "tiny": 50}
AGREE = 1e-3
"""Relative difference of the losses of both sides, at most."""
BACKWARD = 3
"""FLOPs of a training step over a forward pass's: a product has two more in the
backward pass."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """A SmolVLM's sizes; patches have 16 pixels, 4 x 4 make a soft token.

  Attributes:
    side: of a view, in pixels.
    vision, language: width, hidden width, layers, heads.
    kv_heads: of the language model.
    vocab: its ids; the placeholder's is `image`.
  """

  side: int
  vision: tuple[int, int, int, int]
  language: tuple[int, int, int, int]
  kv_heads: int
  vocab: int
  image: int

  @property
  def tokens(self) -> int:
    """Soft tokens of a view."""
    return (self.side // 64) ** 2


SIZES = {
  # 4 of SigLIP's 12 layers and 10 of SmolLM2's 30, with their own widths.
  "third": Size(
    side=256,
    vision=(768, 3072, 4, 12),
    language=(576, 1536, 10, 9),
    kv_heads=3,
    vocab=49_280,
    image=49_190,
  ),
  "tiny": Size(
    side=128,
    vision=(64, 128, 2, 4),
    language=(64, 128, 2, 4),
    kv_heads=2,
    vocab=512,
    image=500,
  ),
}


def size_of(row: str) -> str:
  """Returns the key of a row's sizes."""
  return "tiny" if row.endswith("_tiny") else "third"


def batch(size: Size) -> dict:
  """Returns pixels `[B, V, H, W, 3]`, uint8, and tokens `[B, T]`."""
  import numpy as np

  rng = np.random.default_rng(0)
  shape = (ROWS_IN_BATCH, VIEWS, size.side, size.side, 3)
  soft = np.full((ROWS_IN_BATCH, VIEWS * size.tokens), size.image)
  text = rng.integers(3, size.image, (ROWS_IN_BATCH, TEXT))
  return dict(
    pixels=rng.integers(0, 256, shape, np.uint8),
    tokens=np.concatenate([soft, text], axis=1).astype(np.int32),
  )


def timed(work, runs: int) -> dict:
  """Returns seconds of a call, the median of some, and what the first said."""
  import timing

  first = work()
  seconds = timing.median_seconds(work, runs)
  return dict(seconds=seconds, loss=float(first))


def matmul_rate() -> float:
  """Returns FLOP/s of a product like those of the larger encoder, in fp32."""
  import jax
  import timing

  rows, inner, columns = 2560, 768, 3072
  a, b = jax.numpy.ones((rows, inner)), jax.numpy.ones((inner, columns))
  product = jax.jit(jax.numpy.matmul)

  def work():
    return jax.block_until_ready(product(a, b))

  work()
  return 2 * rows * inner * columns / timing.median_seconds(work, 20)


def make(folder: str, name: str) -> None:
  """Writes the model, by transformers."""
  import torch
  import transformers

  size = SIZES[name]
  torch.manual_seed(0)
  wide, hidden, depth, heads = size.vision
  vision = dict(
    model_type="smolvlm_vision", hidden_size=wide, intermediate_size=hidden,
    num_hidden_layers=depth, num_attention_heads=heads, image_size=size.side,
    patch_size=16,
  )  # fmt: skip
  wide, hidden, depth, heads = size.language
  text = dict(
    model_type="llama", vocab_size=size.vocab, hidden_size=wide,
    intermediate_size=hidden, num_hidden_layers=depth,
    num_attention_heads=heads, num_key_value_heads=size.kv_heads,
    head_dim=wide // heads, rope_theta=100_000.0, max_position_embeddings=8192,
    tie_word_embeddings=False, pad_token_id=2, bos_token_id=1,
    eos_token_id=size.vocab - 1,
  )  # fmt: skip
  config = transformers.SmolVLMConfig(
    vision_config=vision, text_config=text, image_token_id=size.image,
    scale_factor=4, tie_word_embeddings=False, pad_token_id=2,
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
  size = SIZES[size_of(row)]
  made = batch(size)
  pixels = torch.from_numpy(made["pixels"]).permute(0, 1, 4, 2, 3)
  pixels = (pixels.float() / 255 - 0.5) / 0.5
  tokens = torch.from_numpy(made["tokens"]).long()
  labels = torch.where(tokens == size.image, -100, tokens)
  inputs = dict(
    input_ids=tokens,
    attention_mask=torch.ones_like(tokens),
    pixel_values=pixels,
    use_cache=False,
  )
  if "forward" in row:
    model.eval()

    @torch.inference_mode()
    def forward():
      logits = model(**inputs).logits[:, :-1].float()
      return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten()
      )

    return timed(forward, RUNS[size_of(row)])
  model.train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)

  def step():
    optimizer.zero_grad(set_to_none=True)
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    optimizer.step()
    return loss.detach()

  return timed(step, RUNS[size_of(row)])


def ours(row: str, folder: str) -> dict:
  """Returns what we take for a row."""
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
  import jax
  import numpy as np

  from research.interop.load import load_model
  from research.nn.flops import count_flops
  from research.optim import optim
  from research.training import aot, state, step
  from research.vlm import objective

  rate = matmul_rate()
  loaded = load_model(folder, towers="all")
  model = loaded.model.clone(remat="names")
  size = SIZES[size_of(row)]
  made = batch(size)
  tokens = made["tokens"]
  length = tokens.shape[1]
  at = np.arange(length, dtype=np.int32)
  targets = np.roll(tokens, -1, axis=1)
  learned = (targets != size.image) & (at < length - 1)
  rows = dict(
    tokens=tokens,
    targets=targets,
    weights=learned.astype(np.float32),
    positions=np.broadcast_to(at, tokens.shape),
    segments=np.zeros_like(tokens),
    pixels=made["pixels"],
  )
  loss, key = objective.WithImages(model), jax.random.key(0)
  if "forward" in row:
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

    def work():
      return jax.block_until_ready(forward(params, rows))

    limit = count_flops(forward, params, rows) / rate
    return timed(work, RUNS[size_of(row)]) | {"limit": limit}
  tx = optim.adamw(RATE, weight_decay=0.01, clip=None)
  start = state.create(loaded.params, ".", tx)
  run, _ = aot.compile_steps(step.make_train_step(loss, tx), start, [rows], key)
  frozen, now = start.frozen, dataclasses.replace(start, frozen=None)

  def one():
    nonlocal now
    now, metrics = run(now, frozen, rows, key)
    return float(metrics["loss"])

  flops = BACKWARD * count_flops(loss, loaded.params, rows, key)
  return timed(one, RUNS[size_of(row)]) | {"limit": flops / rate}


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
  with tempfile.TemporaryDirectory() as root:
    for size in sorted(set(map(size_of, names))):
      subprocess.run(
        [peers, "-W", "ignore", __file__, "make", f"{root}/{size}", size],
        check=True,
      )
    for row in names:
      folder = f"{root}/{size_of(row)}"
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
          "limit": statistics.median(x["ours"]["limit"] for x in rounds),
          "goal": GOAL,
        }
      )
  return found


def show(found: list[dict]) -> str:
  """Returns the table as Markdown; ratios are theirs over ours."""
  lines = [
    "| row | ours s | transformers s | ratio (min..max) | goal | limit s |",
    "| --- | --- | --- | --- | --- | --- |",
  ]
  for r in found:
    low, high = r["spread"]
    lines.append(
      f"| {r['row']} | {r['ours']:.4f} | {r['torch']:.4f} |"
      f" {r['ratio']:.2f} ({low:.2f}..{high:.2f}) | {r['goal']:g} |"
      f" {r['limit']:.4f} |"
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
