"""Real text, left to right against diffusion: bits per byte.

Two models of equal size learn the same rows of Python's own text, in the same
number of steps, each at its best of a few rates. A row is a mark and a piece of
a document; both predict all of it but the mark, and see nothing else. What
diffusion is worth is its bound, estimated without bias: any number of masks is
as likely as any other (`variants.AnyOrder`), drawn anew for every pass over the
held-out rows, so that the passes say how sure the estimate is.
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

from experiments import diffusion_bounds
from experiments.claims import Verdict
from experiments.diffusion_study import Row, Rows, Tiny, batch_of
from experiments.lora_verdicts import CLOSE
from research.data.bpe import Bpe
from research.data.stdlib import Stdlib
from research.diffusion.objective import MaskedDiffusion
from research.diffusion.schedule import Linear
from research.diffusion.variants import AnyOrder
from research.nn import presets
from research.nn.transformer import Transformer
from research.training import plots
from research.training.objective import Batch, NextToken, Objective
from research.typing import Int, Params, UserError

AR, DIFFUSION = "next token", "diffusion"
KINDS = (AR, DIFFUSION)
MARK = 0
"""`bpe.END`, before each row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
  """Both models on the standard library's sources.

  Attributes:
    tiny: their size, and how they are trained.
    hidden: of the feed-forward.
    vocab: ids that are learned from the training text; one more is the mask.
    length: tokens of a row.
    documents: of the training text, at most; None for all.
    steps: of training.
    rates: tried, for `trial` steps, on half of the held-out rows' number of
      validation rows.
    trial: see `rates`.
    heldout: rows that are measured.
    passes: over them, for the bound; at least two.
  """

  tiny: Tiny = Tiny(width=256, depth=4, batch=4, rate=1e-3, every=50)
  hidden: int = 768
  vocab: int = 4096
  length: int = 256
  documents: int | None = None
  steps: int = 1000
  rates: Sequence[float] = (1e-3, 3e-3)
  trial: int = 100
  heldout: int = 128
  passes: int = 8

  def __post_init__(self):
    if self.passes < 2 or self.heldout < 2:
      raise UserError(
        f"Text: passes is {self.passes} and heldout {self.heldout}, expected"
        " at least 2"
      )

  @property
  def arms(self) -> list[str]:
    """One for the rates of each, then one for each."""
    return [f"rates of {kind}" for kind in KINDS] + list(KINDS)

  def row(self, arm: str, before: Rows) -> Row:
    """Returns bits per byte, by rate or at the end."""
    kind = arm.removeprefix("rates of ")
    if arm != kind:
      bits = {
        rate: self._trained(kind, rate, self.trial, "validation")["bits"]
        for rate in self.rates
      }
      good = {r: b for r, b in bits.items() if math.isfinite(b)}
      if not good:
        raise UserError(f"{arm}: no rate of {tuple(self.rates)} was stable")
      return {"bits": list(bits.values()), "rate": min(good, key=good.get)}
    if f"rates of {kind}" not in before:
      raise UserError(f"{arm}: needs the arm 'rates of {kind}'; run it first")
    rate = before[f"rates of {kind}"]["rate"]
    return {"rate": rate, **self._trained(kind, rate, self.steps, "heldout")}

  def _trained(self, kind: str, rate: float, steps: int, split: Any) -> Row:
    """Returns what a model of some steps is worth."""
    model, params = self._load()
    pool = _batch(*self._rows("train", None))
    objective = self._objective(kind, model)
    params = self.tiny.trained(objective, params, pool, steps, 0, rate)
    return self._worth(kind, model, params, split)

  def _load(self) -> tuple[Transformer, Params]:
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
    return model, jax.jit(model.init)(jax.random.key(0), tokens)["params"]

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
    nats, error = diffusion_bounds.passes(objective, params, each, keys)
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

  def table(self, rows: Rows) -> list[dict[str, Any]]:
    """Returns a line for each model."""
    read = self.steps * self.tiny.batch * self.length
    lines = [
      {
        "model": kind,
        "rate": rows[kind]["rate"],
        "tokens read": read,
        "bits a byte": rows[kind]["bits"],
        "+- (1 s.e.)": rows[kind]["error"],
        "parameters": rows[kind]["parameters"],
      }
      for kind in KINDS
    ]
    nothing = {"rate": 0.0, "tokens read": 0, "+- (1 s.e.)": 0.0}
    own = {"model": "unigrams", "bits a byte": self.unigram(), "parameters": 0}
    return [*lines, nothing | own]

  def verdicts(self, rows: Rows) -> list[Verdict]:
    """Returns what holds of D1 on real text."""
    ar, bound = rows[AR]["bits"], rows[DIFFUSION]["bits"]
    error, known = rows[DIFFUSION]["error"], self.unigram()
    return [
      Verdict(
        "the bound is known to 1%",
        f"{bound:.3f} ± {error:.3f} bits a byte (1 s.e.)",
        error < 0.01 * bound,
      ),
      Verdict(
        "diffusion has learned more than how frequent tokens are (10% less)",
        f"{bound:.3f} bits a byte, unigrams {known:.3f}",
        bound + 2 * error < 0.9 * known,
      ),
      Verdict(
        "at equal parameters, data and steps it is within 2% of next-token"
        " prediction",
        f"{bound:.3f} ± {error:.3f} against {ar:.3f}: {bound / ar - 1:+.1%}",
        bound - 2 * error < (1 + CLOSE) * ar,
      ),
    ]

  def draw(self, rows: Rows, folder: pathlib.Path, title: str) -> None:
    """Leaves text.png: bits per byte of each."""
    drawn = plots.figure(7, 2.6)
    axes = drawn.add_subplot()
    axes.barh(
      [*KINDS, "unigrams"],
      [*(rows[kind]["bits"] for kind in KINDS), self.unigram()],
      xerr=[*(rows[kind]["error"] for kind in KINDS), 0.0],
      color=plots.style(0)["color"],
      capsize=2,
    )
    axes.invert_yaxis()
    axes.set(xlabel="held-out bits a byte", title=title)
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
  """Returns rows as a batch; what is not real, but the mark, is not seen."""
  seen = jnp.asarray(real).at[:, 0].set(True)
  return batch_of(rows, real) | {"segments": jnp.where(seen, 0, -1)}


def _chunks(rows: Any, real: Any, size: int) -> list[tuple[Any, Any]]:
  """Returns rows in batches of one shape; the last one is filled with none."""
  short = -len(rows) % size
  rows = np.pad(rows, ((0, short), (0, 0)))
  real = np.pad(real, ((0, short), (0, 0)))
  return [
    (rows[i : i + size], real[i : i + size]) for i in range(0, len(rows), size)
  ]
