"""A beam search by a reward model, ours against the usual loop over `generate`.

  make bench ARGS='search_beam_n16 --repeats=3'
  .venv/bin/python tests/bench/bench_search.py ours ROW [RUNS]
  .venv-peers/bin/python tests/bench/bench_search.py torch ROW [RUNS]

A Llama of 12M parameters with random weights in fp32 is the policy and, with a
direction of its last hidden states as a head, the reward model. Each of N = 16
paths draws 8 steps of 32 tokens after a prompt of 64; the best 4 go on as 4
each.

  search_beam_n16     one problem
  search_beam_n16_p4  four problems in one batch

The loop is the one that search-and-learn and others have: each iteration calls
transformers' `generate` on all texts so far, and then the reward model on all
of them. Ours keeps both caches, and copies rows of them. `same` says that the
reward models agree on a text. `verifier` is its share of the time.
"""

import json
import os
import pathlib
import resource
import sys
import tempfile
import time

ROWS = ("search_beam_n16", "search_beam_n16_p4")
N, KEEP, STEPS, STEP, PROMPT = 16, 4, 8, 32, 64
CONFIG = dict(
  architectures=["LlamaForCausalLM"],
  model_type="llama",
  hidden_act="silu",
  hidden_size=384,
  intermediate_size=1152,
  max_position_embeddings=512,
  num_attention_heads=6,
  num_hidden_layers=6,
  num_key_value_heads=2,
  rms_norm_eps=1e-5,
  rope_theta=500_000.0,
  tie_word_embeddings=False,
  vocab_size=2048,
)


def weights():
  """Returns the same random weights on both sides, under their usual names."""
  import numpy as np

  rng = np.random.default_rng(0)
  d, f, v = (
    CONFIG[k] for k in ("hidden_size", "intermediate_size", "vocab_size")
  )
  shared = d // CONFIG["num_attention_heads"] * CONFIG["num_key_value_heads"]
  shapes = {
    "model.embed_tokens": (v, d),
    "model.norm": (d,),
    "lm_head": (v, d),
  }
  for i in range(CONFIG["num_hidden_layers"]):
    layer = {
      "self_attn.q_proj": (d, d),
      "self_attn.k_proj": (shared, d),
      "self_attn.v_proj": (shared, d),
      "self_attn.o_proj": (d, d),
      "mlp.gate_proj": (f, d),
      "mlp.up_proj": (f, d),
      "mlp.down_proj": (d, f),
      "input_layernorm": (d,),
      "post_attention_layernorm": (d,),
    }
    shapes |= {f"model.layers.{i}.{name}": x for name, x in layer.items()}
  out = {}
  for name, shape in shapes.items():
    scale = 1.0 if len(shape) == 1 else 1.5 / shape[-1] ** 0.5
    x = rng.standard_normal(shape) if len(shape) == 2 else np.ones(shape)
    out[f"{name}.weight"] = (scale * x).astype(np.float32)
  return out


def direction():
  """Returns the reward model's head, `[D]`."""
  import numpy as np

  d = CONFIG["hidden_size"]
  return (np.cos(np.arange(d)) / d**0.5).astype(np.float32)


def prompts(problems: int) -> list[list[int]]:
  import numpy as np

  rng = np.random.default_rng(1)
  return rng.integers(0, CONFIG["vocab_size"], (problems, PROMPT)).tolist()


def saved(place: str) -> pathlib.Path:
  """Leaves the checkpoint in a folder, which it returns."""
  import safetensors.numpy

  folder = pathlib.Path(place)
  (folder / "config.json").write_text(json.dumps(CONFIG))
  safetensors.numpy.save_file(
    weights(), folder / "model.safetensors", metadata={"format": "pt"}
  )
  return folder


def timed(work, problems: int, runs: int) -> dict:
  """Returns drawn tokens/s of the runs after the first, and its seconds."""
  import timing

  first = timing.seconds(work)
  count = problems * N * STEPS * STEP
  out = timing.tokens_per_s(work, count, runs, warm_up=False)
  return out | dict(first_s=round(first, 2))


class Timed:
  """A verifier whose reading is timed."""

  def __init__(self, inner):
    self.inner, self.seconds = inner, 0.0
    # Attributes of its own: the engine's check of protocols sees no others.
    for name in ("prompt_cost", "step_cost", "start", "select", "store"):
      setattr(self, name, getattr(inner, name))

  def read(self, *args):
    begin = time.perf_counter()
    out = self.inner.read(*args)  # scores are on the host: it has waited
    self.seconds += time.perf_counter() - begin
    return out


def ours(row: str, runs: int) -> dict:
  """Times our engine."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from research.generation import Boundary, Sampling, Stepwise, generate
  from research.interop.load import load_model
  from research.search import CachedVerifier, Engine, Limits
  from research.search.strategies import Beam
  from research.training.memory import peak_memory_bytes

  with tempfile.TemporaryDirectory() as place:
    it = load_model(saved(place))
  params, problems = generate.prepare(it.params, it.model), _problems(row)
  none = np.zeros((1, it.model.vocab_size), bool)
  policy = Stepwise(
    model=it.model,
    params=params,
    sampling=Sampling(temperature=1.0),
    boundary=Boundary(np.zeros_like(none, np.int32), none, np.int32(STEP)),
    size=STEP,
  )

  def head(params, hidden):
    return jax.nn.sigmoid(hidden @ jnp.asarray(direction()))

  verifier = CachedVerifier(model=it.model, params=params, head=head)
  engine = Engine(policy=policy, verifier=verifier)
  limits = Limits(tokens=STEPS * STEP, key=jax.random.key(0))
  last = {}

  def once(engine=engine):
    samples = Beam(copies=N, width=N // KEEP)(engine, prompts(problems), limits)
    last["lengths"] = [len(x.tokens) for one in samples for x in one.paths]

  out = timed(once, problems, runs)
  if set(last["lengths"]) != {STEPS * STEP}:
    raise RuntimeError(f"found paths of {set(last['lengths'])} tokens")
  watched = Timed(verifier)
  begin = time.perf_counter()
  once(Engine(policy=policy, verifier=watched))
  share = watched.seconds / (time.perf_counter() - begin)
  state = verifier.start(prompts(1), 1, 3)
  _, score = verifier.read(state, (), np.array([[5, 6, 7]], np.int32))
  return out | dict(
    score=float(score[0]),
    verifier=round(share, 3),
    peak_rss_bytes=peak_memory_bytes(),
  )


def theirs(row: str, runs: int) -> dict:
  """Times the loop over `generate`."""
  import torch
  import transformers

  torch.set_num_threads(2)
  torch.manual_seed(0)
  with tempfile.TemporaryDirectory() as place:
    model = transformers.AutoModelForCausalLM.from_pretrained(
      saved(place), dtype=torch.float32
    ).eval()
  problems, head = _problems(row), torch.from_numpy(direction())
  spent = [0.0]

  def scored(texts):
    begin = time.perf_counter()
    hidden = model.model(texts).last_hidden_state[:, -1]
    found = torch.sigmoid(hidden @ head)
    spent[0] += time.perf_counter() - begin
    return found

  def once():
    texts = torch.tensor([p for p in prompts(problems) for _ in range(N)])
    for step in range(STEPS):
      texts = model.generate(
        texts,
        attention_mask=torch.ones_like(texts),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=STEP,
        min_new_tokens=STEP,
        pad_token_id=0,
        eos_token_id=None,
      )
      scores = scored(texts).view(problems, N)
      if step < STEPS - 1:
        best = scores.topk(KEEP, dim=1).indices.repeat_interleave(
          N // KEEP, dim=1
        )
        texts = texts.view(problems, N, -1)
        texts = torch.stack([x[i] for x, i in zip(texts, best, strict=True)])
        texts = texts.flatten(0, 1)
    if texts.shape[1] != PROMPT + STEPS * STEP:
      raise RuntimeError(f"found texts of {texts.shape[1]} tokens")

  with torch.inference_mode():
    out = timed(once, problems, runs)
    spent[0], begin = 0.0, time.perf_counter()
    once()
    share = spent[0] / (time.perf_counter() - begin)
    score = scored(torch.tensor([[*prompts(1)[0], 5, 6, 7]]))
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return out | dict(
    score=float(score[0]), verifier=round(share, 3), peak_rss_bytes=peak
  )


def _problems(row: str) -> int:
  return int(row.partition("_p")[2] or 1)


def rows(names: list[str], peers: str, repeats: int) -> list[dict]:
  """Returns medians and ratios of each row; sides alternate.

  Args:
    names: of `ROWS`.
    peers: their Python.
    repeats: rounds.
  """
  from tests.bench import sides  # the script alone does not see it

  keys = ("tokens_per_s", "verifier", "peak_rss_bytes", "first_s")
  found = []
  for row in names:
    line, pairs = sides.compare(__file__, row, peers, repeats, keys)
    one, other = (side["score"] for side in pairs[0])
    line["same"] = abs(one - other) < 1e-4
    found.append(line)
    print(f"  {json.dumps(line)}", file=sys.stderr, flush=True)
  return found


def show(found: list[dict]) -> str:
  """Returns the table as Markdown."""
  lines = [
    "| row | ours tok/s | transformers tok/s | ratio (min..max) | same scores "
    "| verifier ours, theirs | first run s | ours GiB | theirs GiB |",
    "| --- " * 9 + "|",
  ]
  for r in found:
    cells = [
      r["row"],
      f"{r['ours_tokens_per_s']:.0f}",
      f"{r['torch_tokens_per_s']:.0f}",
      f"{r['ratio']:.2f} ({min(r['ratios']):.2f}..{max(r['ratios']):.2f})",
      "yes" if r["same"] else "NO",
      f"{r['ours_verifier']:.0%}, {r['torch_verifier']:.0%}",
      f"{r['ours_first_s']:.1f}",
      f"{r['ours_peak_rss_bytes'] / 2**30:.2f}",
      f"{r['torch_peak_rss_bytes'] / 2**30:.2f}",
    ]
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


if __name__ == "__main__":
  sys.path[:0] = [str(pathlib.Path(__file__).parent), os.getcwd()]
  side, row, *counts = sys.argv[1:]
  work = {"ours": ours, "torch": theirs}[side]
  print(json.dumps(work(row, int(counts[0]) if counts else 2)))
