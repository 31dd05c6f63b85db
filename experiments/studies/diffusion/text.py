"""Real text, left to right against diffusion: bits per byte.

Two models of equal size learn the same rows of Python's own text, each at its
best of a few rates; diffusion goes on for several times as many tokens, since
that is what it needs. A row is a mark and a piece of a document; both predict
all of it but the mark, and see nothing else. What diffusion is worth is its
bound, estimated without bias: any number of masks is as likely as any other
(`variants.AnyOrder`), drawn anew for every pass over the held-out rows, so that
the passes say how sure the estimate is.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.core.stats import below, mean, paired
from experiments.studies import pictures
from experiments.studies.diffusion import bounds
from experiments.studies.diffusion.study import (
  DiffusionStudy,
  Tiny,
  at,
  best_rate,
  marks,
  swept,
  swept_before,
)
from experiments.studies.lora.lora_verdicts import CLOSE
from experiments.studies.protocol import Lines, Row, Rows, Verdict
from research.data.batches import batch_of
from research.data.bpe import Bpe
from research.data.sources.stdlib import Stdlib
from research.diffusion.objective import MaskedDiffusion
from research.diffusion.schedule import Linear
from research.diffusion.variants import AnyOrder
from research.nn import presets
from research.nn.transformer import Transformer
from research.training.objectives.objective import Batch, NextToken, Objective
from research.training.reports import plots
from research.typing import Int, Params, UserError

AR, DIFFUSION = "next token", "diffusion"
KINDS = (AR, DIFFUSION)
MARK = 0
"""`bpe.END`, before each row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(DiffusionStudy):
  """Both models on the standard library's sources.

  Attributes:
    tiny: their size, and how they are trained.
    hidden: of the feed-forward.
    vocab: ids that are learned from the training text; one more is the mask.
    length: tokens of a row.
    documents: of the training text, at most; None for all.
    steps: of next-token prediction.
    steps_factor: how many times as many steps diffusion takes.
    rates: tried, for `trial` steps, on half as many validation rows as there
      are held-out ones.
    trial: see `rates`.
    seeds: of weights, order and masks.
    heldout: rows that are measured.
    passes: over them, for the bound; at least two.
    points: of each curve.
  """

  tiny: Tiny = Tiny(width=96, depth=4, batch=16, rate=3e-3, every=50)
  hidden: int = 256
  vocab: int = 512
  length: int = 128
  documents: int | None = None
  steps: int = 600
  steps_factor: int = 8
  rates: Sequence[float] = (1e-3, 3e-3, 1e-2)
  trial: int = 200
  seeds: int = 3
  heldout: int = 128
  passes: int = 4
  points: int = 6

  def __post_init__(self):
    if self.passes < 2 or self.heldout < 2:
      raise UserError(
        f"Text: passes is {self.passes} and heldout {self.heldout}, expected"
        " at least 2"
      )

  @property
  def arms(self) -> list[str]:
    """One for the rates of each kind, then one for each kind and seed."""
    return swept(KINDS, self.seeds)

  def run(self, arm: str, before: Rows, shared: Any) -> Row:
    """Returns the best rate, or a curve of bits per byte."""
    if arm.startswith("rates of "):
      return self._swept(arm.removeprefix("rates of "))
    kind, seed, rate = swept_before(arm, before)
    steps = self.steps * (1 if kind == AR else self.steps_factor)
    curve = self.curve(kind, seed, steps, rate, "heldout", self.points)
    return {"kind": kind, "seed": seed, "rate": rate, **curve}

  def _swept(self, kind: str) -> Row:
    seed = self.seeds  # a seed that is not reported
    bits = {
      rate: self.curve(kind, seed, self.trial, rate, "validation", 1)["bits"][0]
      for rate in self.rates
    }
    return {"bits": list(bits.values()), "rate": best_rate(kind, bits)}

  def curve(
    self,
    kind: str,
    seed: int,
    steps: int,
    rate: float,
    split: Any,
    points: int,
  ) -> dict[str, Any]:
    """Returns `read` (tokens so far), `bits` and their `error`, three lists."""
    model, params = self._load(seed)
    objective = self._objective(kind, model)
    pool = _batch(*self._rows("train", None))
    wanted = marks(steps, self.tiny.every, points)
    read, found = [], []
    tried = self.tiny.train(objective, params, pool, steps, seed, rate)
    for done, now in tried:
      if done in wanted:
        read.append(done * self.tiny.batch * self.length)
        found.append(self._worth(kind, model, now, split))
    return {
      "read": read,
      "bits": [f["bits"] for f in found],
      "error": [f["error"] for f in found],
      **{k: found[-1][k] for k in ("bytes", "tokens", "parameters")},
    }

  def _load(self, seed: int) -> tuple[Transformer, Params]:
    sizes = presets.Sizes(
      vocab=self.vocab + 1,
      width=self.tiny.width,
      depth=self.tiny.depth,
      heads=self.tiny.heads,
      kv_heads=self.tiny.heads,
      head_dim=self.tiny.width // self.tiny.heads,
      hidden=self.hidden,
      tied=True,
    )
    model = presets.transformer(presets.FAMILIES["llama"], sizes)
    tokens = jnp.zeros((1, 2), jnp.int32)
    return model, jax.jit(model.init)(jax.random.key(seed), tokens)["params"]

  def _objective(self, kind: str, model: Transformer) -> Objective:
    if kind == AR:
      return NextToken(model=model, rows=1024)
    return MaskedDiffusion(
      model=model,
      mask_id=self.vocab,
      schedule=Linear(),
      noise="learned",
      spread="even",
      rows=1024,
    )

  def _rows(self, split: Any, limit: int | None) -> Any:
    """Returns rows, and which of their tokens are predicted."""
    rows = pieces(self.vocab, self.documents, split, self.length)
    rows = rows if limit is None else rows[:limit]
    # Padding is behind a document's end; a mark there is no more than that.
    real = np.pad(rows[:, 1:] != MARK, ((0, 0), (1, 0)))
    return rows, real

  def _worth(self, kind: str, model: Any, params: Params, split: Any) -> Row:
    """Returns bits per byte, their error, and bytes a token."""
    count = self.heldout if split == "heldout" else self.heldout // 2
    rows, real = self._rows(split, count)
    size = text_bytes(self.vocab, self.documents)[rows[real]].sum()
    scale = int(real.sum()) / (math.log(2) * float(size))
    each = [_batch(r, w) for r, w in _chunks(rows, real, self.tiny.batch)]
    if kind == AR:
      objective, keys = NextToken(model=model, rows=1024), [None]
    else:
      objective = AnyOrder(
        model=model,
        mask_id=self.vocab,
        noise="learned",
        spread="even",
        rows=1024,
      )
      keys = list(jax.random.split(jax.random.key(7), self.passes))
    nats, error = bounds.passes(objective, params, each, keys)
    return {
      "bits": nats * scale,
      "error": error * scale,
      "bytes": float(size),
      "tokens": int(real.sum()),
      "parameters": sum(x.size for x in jax.tree.leaves(params)),
    }

  def unigram(self) -> float:
    """Returns held-out bits per byte by how frequent tokens are in training."""
    rows, real = self._rows("train", None)
    counts = np.bincount(rows[real], minlength=self.vocab) + 1.0
    rows, real = self._rows("heldout", self.heldout)
    nats = -np.log(counts / counts.sum())[rows[real]].sum()
    size = text_bytes(self.vocab, self.documents)[rows[real]].sum()
    return float(nats / math.log(2) / size)

  # --- what the rows say ---

  def _of(self, rows: Rows, kind: str) -> list[Row]:
    return [rows[f"{kind}, seed {s}"] for s in range(self.seeds)]

  def bits(self, rows: Rows, kind: str, read: int | None = None) -> list[float]:
    """Returns each seed's bits a byte, at the end or after `read` tokens."""
    return [at(row, "bits", read) for row in self._of(rows, kind)]

  def table(self, rows: Rows) -> Lines:
    """Returns a line for each model, and for counted tokens."""
    equal = self.steps * self.tiny.batch * self.length
    lines = []
    for kind, read in ((AR, equal), (DIFFUSION, equal), (DIFFUSION, None)):
      first = self._of(rows, kind)[0]
      found = mean(self.bits(rows, kind, read))
      lines.append(
        {
          "model": kind,
          "rate": first["rate"],
          "tokens read": read or first["read"][-1],
          "bits a byte": found,
          "parameters": first["parameters"],
        }
      )
    return [*lines, {"model": "unigrams", "bits a byte": self.unigram()}]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of D1 on real text."""
    equal = self.steps * self.tiny.batch * self.length
    known = self.unigram()
    last = mean(self.bits(rows, DIFFUSION))
    error = max(row["error"][-1] for row in self._of(rows, DIFFUSION))
    return [
      Verdict(
        "the bound of a model is known to 1%",
        f"{last.value:.3f} ± {error:.3f} bits a byte (1 s.e.)",
        error < 0.01 * last.value,
      ),
      Verdict(
        "diffusion has learned more than how frequent tokens are (10% less)",
        f"{last} bits a byte, unigrams {known:.3f}",
        below(last, 0.9 * known),
      ),
      self._close(
        rows,
        "at equal parameters, tokens and FLOPs it is within 2% of next-token"
        " prediction",
        equal,
      ),
      self._close(
        rows, f"with {self.steps_factor} times the tokens it is", None
      ),
    ]

  def _close(self, rows: Rows, claim: str, read: int | None) -> Verdict:
    ar, bound = self.bits(rows, AR), self.bits(rows, DIFFUSION, read)
    behind = paired(bound, ar)
    base = mean(ar).value
    said = f"behind by {behind} of {base:.3f} bits a byte"
    return Verdict(
      claim,
      f"{said}: {behind.value / base:+.1%}",
      below(paired(bound, [(1 + CLOSE) * x for x in ar])),
    )

  def plot(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves text.png: bits per byte against tokens read."""
    drawn = plots.figure(7, 4.2)
    axes = drawn.add_subplot()
    runs = {kind: self._of(rows, kind) for kind in KINDS}
    pictures.curves(axes, runs, "read", "bits")
    axes.axhline(self.unigram(), label="unigrams", **plots.style(2))
    axes.set(
      xscale="log",
      xlabel="tokens through the model, of training",
      ylabel="held-out bits a byte",
      title=title,
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    plots.save(drawn, folder / "text.png")


@functools.cache
def _tokenizer(vocab: int, documents: int | None) -> Any:
  return Bpe(documents=Stdlib("train", limit=documents), size=vocab).load()


@functools.cache
def pieces(
  vocab: int, documents: int | None, split: Any, length: int
) -> Int[np.ndarray, "N T"]:
  """Returns rows of a mark and a piece of a document, padded with marks.

  Args:
    vocab: of the tokenizer, which is learned from the training text.
    documents: of the split, at most; None for all.
    split: which.
    length: of rows.
  """
  source, out = Stdlib(split, limit=documents), []
  tokenizer = _tokenizer(vocab, documents)
  for i in range(len(source)):
    ids = tokenizer.encode(source[i])
    for start in range(0, len(ids), length - 1):
      some = ids[start : start + length - 1]
      out.append([MARK, *some] + [MARK] * (length - 1 - len(some)))
  # In no order, so that the first few are a fair sample.
  rows = np.asarray(out, np.int32)
  return rows[np.random.default_rng(0).permutation(len(rows))]


@functools.cache
def text_bytes(vocab: int, documents: int | None) -> Int[np.ndarray, " V"]:
  """Returns how many bytes of text each id stands for."""
  backend = _tokenizer(vocab, documents).backend
  # A byte-level vocabulary spells each byte as one character.
  out = [len(backend.id_to_token(i) or "") for i in range(vocab)]
  out[MARK] = 0
  return np.asarray(out)


def _batch(rows: Any, real: Any) -> Batch:
  """Returns rows as a batch; what is not real, but the mark, is hidden."""
  visible = jnp.asarray(real).at[:, 0].set(True)
  return batch_of(rows, real) | {"segments": jnp.where(visible, 0, -1)}


def _chunks(rows: Any, real: Any, size: int) -> list[tuple[Any, Any]]:
  """Returns rows in batches of one shape; the last one is filled with none."""
  short = -len(rows) % size
  rows = np.pad(rows, ((0, short), (0, 0)))
  real = np.pad(real, ((0, short), (0, 0)))
  return [
    (rows[i : i + size], real[i : i + size]) for i in range(0, len(rows), size)
  ]
