"""The torch side of the speed table: transformers and PEFT on this CPU.

  .venv-peers/bin/python tests/bench/bench_torch.py [ROW ...] [--runs 3]
      [--steps 3] [--threads 2] [--list]

Each row runs in its own process and prints one JSON line: tokens/s (median of
the runs inside that process, after a warm-up), each run, and the process's
peak resident memory. Real SmolLM2-135M weights throughout.

  train_{fp32,bf16}              PEFT r=8 all-linear, batch 4 x 256, AdamW
  decode_b{1,8}_{fp32,bf16}      prompt 32 + 64 greedy tokens, prefill within;
                                 the faster of `generate` and a loop of ours
                                 over a StaticCache
  perplexity_{fp32,bf16}         forward and loss, 1 x 1024
  prefill_b{1,8}_{fp32,bf16}     prompt 512 and its first token; not in ROWS

The parent must not import torch: Linux counts its memory into the child's
ru_maxrss when the child is started.
"""

import argparse
import functools
import json
import pathlib
import resource
import subprocess
import sys

ROWS = (
  "train_fp32",
  "train_bf16",
  "decode_b1_fp32",
  "decode_b8_fp32",
  "decode_b1_bf16",
  "decode_b8_bf16",
  "perplexity_fp32",
  "perplexity_bf16",
)
UNLISTED = tuple(f"prefill_b{b}_{d}" for b in (1, 8) for d in ("fp32", "bf16"))
"""Rows that only `bench_decode4bit` asks for."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
BATCH, LENGTH = 4, 256
PROMPT, NEW = 32, 64
PREFILL = 512
WINDOW = 1024


def peer():
  """Returns the module `smollm2` of `tests/peers`."""
  sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "peers"))
  import smollm2

  return smollm2


def load(dtype: str):
  """Returns (the real model in torch's default attention, its token ids)."""
  import torch

  smollm2 = peer()
  model = smollm2.reference(getattr(torch, DTYPES[dtype]), attention="sdpa")
  ids = smollm2.encode(smollm2.text()[:60000])
  return model, torch.from_numpy(ids).long()


def train(dtype: str, runs: int, steps: int, config=None) -> dict:
  """Times whole optimizer steps of adapters on every linear layer.

  Args:
    dtype: of the base and of activations.
    runs, steps: see `timing.tokens_per_s`.
    config: PEFT's, of the adapters; LoRA's if None.
  """
  import peft
  import timing
  import torch

  model, ids = load(dtype)
  config = config or peft.LoraConfig(
    r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
  )
  # PEFT keeps A and B in fp32 over a bf16 base, as we do.
  adapted = peft.get_peft_model(model, config).train()
  chosen = [p for p in adapted.parameters() if p.requires_grad]
  # The same layers, without what AdaLoRA's wrapper adds to the loss.
  model = adapted.get_base_model()
  optimizer = torch.optim.AdamW(chosen, lr=2e-4)
  rows = ids[: BATCH * LENGTH].reshape(BATCH, LENGTH)
  losses = []

  def step():
    optimizer.zero_grad(set_to_none=True)
    loss = model(input_ids=rows, labels=rows, use_cache=False).loss
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))

  out = timing.tokens_per_s(step, BATCH * LENGTH, runs, steps)
  return out | dict(
    trainable=sum(p.numel() for p in chosen),
    loss_first=round(losses[0], 4),
    loss_last=round(losses[-1], 4),
  )


def decode(batch: int, dtype: str, runs: int, steps: int) -> dict:
  """Times greedy decoding; the faster of two ways, and both."""
  import timing
  import torch
  import transformers

  model, ids = load(dtype)
  prompt = ids[: batch * PROMPT].reshape(batch, PROMPT)
  model.generation_config.eos_token_id = None
  config = transformers.GenerationConfig(
    max_new_tokens=NEW, do_sample=False, use_cache=True, pad_token_id=0
  )
  found = {}

  def generate():
    found["generate"] = model.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      generation_config=config,
    )[:, PROMPT:]

  def loop():
    found["loop"] = static_loop(model, prompt)

  with torch.inference_mode():
    ways = {
      "generate": timing.tokens_per_s(generate, batch * NEW, runs, steps),
      "loop": timing.tokens_per_s(loop, batch * NEW, runs, steps),
    }
  best = max(ways, key=lambda k: ways[k]["tokens_per_s"])
  same = float((found["generate"] == found["loop"]).float().mean())
  return ways[best] | dict(
    way=best,
    tokens_per_s_generate=ways["generate"]["tokens_per_s"],
    tokens_per_s_loop=ways["loop"]["tokens_per_s"],
    same_tokens=round(same, 4),
  )


def static_loop(model, prompt):
  """Returns NEW greedy tokens by a bare loop over a preallocated cache."""
  import torch
  import transformers

  batch = prompt.shape[0]
  cache = transformers.StaticCache(
    config=model.config, max_cache_len=PROMPT + NEW
  )
  place = torch.arange(PROMPT).expand(batch, -1)
  logits = model(
    input_ids=prompt,
    past_key_values=cache,
    position_ids=place,
    logits_to_keep=1,
  ).logits
  out = [logits[:, -1].argmax(-1)]
  for i in range(NEW - 1):
    place = torch.full((batch, 1), PROMPT + i)
    logits = model(
      input_ids=out[-1][:, None],
      past_key_values=cache,
      position_ids=place,
    ).logits
    out.append(logits[:, -1].argmax(-1))
  return torch.stack(out, 1)


def prefill(batch: int, dtype: str, runs: int, steps: int) -> dict:
  """Times reading prompts and choosing one token."""
  import timing
  import torch

  model, ids = load(dtype)
  prompt = ids[: batch * PREFILL].reshape(batch, PREFILL)

  def read():
    model(input_ids=prompt, use_cache=True, logits_to_keep=1).logits.argmax(-1)

  with torch.inference_mode():
    return timing.tokens_per_s(read, batch * PREFILL, runs, steps)


def perplexity(dtype: str, runs: int, steps: int) -> dict:
  """Times forward and loss of one window."""
  import timing
  import torch

  model, ids = load(dtype)
  rows = ids[:WINDOW][None]
  last = {}

  def window():
    logits = model(input_ids=rows, use_cache=False).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits.float(), rows[0, 1:])
    last["nll"] = float(loss)

  with torch.inference_mode():
    out = timing.tokens_per_s(window, WINDOW, runs, steps)
  return out | dict(nll=round(last["nll"], 4))


def measure(row: str, runs: int, steps: int, threads: int) -> dict:
  """Runs one row in this process."""
  import torch
  import transformers

  torch.set_num_threads(threads)
  torch.manual_seed(0)
  transformers.logging.set_verbosity_error()
  kind, *rest = row.split("_")
  work = {
    "train": train,
    "perplexity": perplexity,
    "decode": lambda size, *a: decode(int(size[1:]), *a),
    "prefill": lambda size, *a: prefill(int(size[1:]), *a),
  }[kind]
  out = functools.partial(work, *rest)(runs, steps)
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return dict(
    row=row,
    **out,
    peak_rss_bytes=peak,
    threads=threads,
    torch=torch.__version__,
    transformers=transformers.__version__,
  )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
  parser.add_argument("--runs", type=int, default=3)
  parser.add_argument("--steps", type=int, default=None, help="calls a run")
  parser.add_argument("--threads", type=int, default=2)
  parser.add_argument("--list", action="store_true", help="print the rows")
  parser.add_argument("--here", action="store_true", help="in this process")
  args = parser.parse_args()
  if args.list:
    print("\n".join(ROWS))
    return 0
  if unknown := set(args.rows) - {*ROWS, *UNLISTED}:
    parser.error(f"no row {', '.join(sorted(unknown))}; see --list")
  failed = 0
  for row in args.rows or ROWS:
    steps = args.steps or (3 if row.startswith("train") else 1)
    if args.here:
      out = measure(row, args.runs, steps, args.threads)
      print(json.dumps(out), flush=True)
      continue
    options = [f"--{k}={getattr(args, k)}" for k in ("runs", "threads")]
    command = [sys.executable, "-W", "ignore", __file__, row, "--here"]
    command += [*options, f"--steps={steps}"]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parent)
    failed += done.returncode != 0
  return int(failed > 0)


if __name__ == "__main__":
  raise SystemExit(main())
