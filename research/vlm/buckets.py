"""Samples with no, one or many images as batches of a few shapes.

A bucket is a shape: tokens of a row, views that its rows have room for, patches
of a view at native resolution, rows of a batch. Each sample goes to the
smallest bucket with room for it, where it may share a row with others; what
fits in none is counted, with the reason. Only texts and sizes of images are
read to decide that (of files, the headers); they are cut into views when a
batch is made.

The pixels of a unit are one array, `[1, V, H, W, 3]`, for `pool` rows. With
`pool` 1 each row has V views of its own; with more, V is a budget that rows
with many images and rows with none share, so that few views are padding. At
native resolution the array has patches, `[1, V, N, X]`, N of them for each
image; those that an image does not use are padding.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.data import bucketing, knapsack
from research.data.bucketing import BucketedBatches, BucketRows
from research.data.packing import Row, Rows
from research.data.sources import NoExamples
from research.io import folders
from research.ranges import AtLeast, NonNegativeInt, PositiveInt, Ranged
from research.typing import Int, UserError
from research.vlm import data
from research.vlm.images.plan import Plan, Views
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.resize import Size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket(Ranged):
  """A shape of batches.

  Attributes:
    length: tokens of a row, T.
    views: views that the rows of a pool have room for, V; 0 for text alone.
    patches: places for patches of a view, N, at native resolution; None where
      views are of one size.
    rows: rows in a batch over all processes, B.
    pool: consecutive rows that share their views; a divisor of `rows`.
  """

  length: AtLeast(2)
  views: NonNegativeInt = 1
  patches: PositiveInt | None = None
  rows: PositiveInt = 8
  pool: PositiveInt = 1

  def __post_init__(self):
    super().__post_init__()
    if self.rows % self.pool:
      raise UserError(
        f"Bucket.rows: found {self.rows}, expected a multiple of pool,"
        f" {self.pool}."
      )

  def __str__(self) -> str:
    patches = "" if self.patches is None else f" of {self.patches} patches"
    pool = f" for {self.pool} rows" if self.pool > 1 else ""
    return f"{self.length} tokens, {self.views} views{patches}{pool}"

  @property
  def encoder_size(self) -> float:
    """What the encoder reads for a row: patches, or views of one size."""
    return self.views * (self.patches or 1) / self.pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class BucketedQuestions(Ranged, data.ImageData):
  """Samples in buckets; a `research.data.pipeline.Data`.

  Attributes:
    samples: questions about images, or about none, and conversations.
    preprocessor: how an image becomes views, and what stands for it.
    buckets: the shapes.
    template: the text around images; conversations have the tokenizer's.
    packing: how samples share rows: `knapsack.best_fit` or `one_per_row`.
    seed: of the shuffle.
    threads: that read images and cut them into views.
    inputs: what rows have of views: `data.Pixels()`, or features of a frozen
      encoder (`research.vlm.cached`).
  """

  samples: data.Samples
  preprocessor: Preprocessor
  image_token: int
  buckets: tuple[Bucket, ...]
  template: data.Template = data.Template()
  packing: knapsack.Packing = knapsack.best_fit
  seed: NonNegativeInt = 0
  threads: PositiveInt = 1
  inputs: data.ViewInputs = data.Pixels()

  def __post_init__(self):
    super().__post_init__()
    shapes = [(x.length, x.views, x.patches, x.pool) for x in self.buckets]
    if not shapes or len(set(shapes)) < len(shapes):
      raise UserError(
        f"BucketedQuestions.buckets: found {[str(x) for x in self.buckets]},"
        " expected at least one, and none twice."
      )
    for bucket in self.buckets:
      if bucket.views:
        self.preprocessor.check_patches("Bucket", bucket.patches)

  def check_files(self) -> None:
    """Checks nothing: `training` counts and leaves out what cannot be read."""

  @property
  def length(self) -> int:
    return max(bucket.length for bucket in self.buckets)

  @property
  def batch_size(self) -> int:
    return max(bucket.rows for bucket in self.buckets)

  def plan(self, tokenizer: Any) -> "BucketPlan":
    """Returns which samples share which rows of which bucket.

    Raises:
      NoExamples: no sample fits in any bucket.
      UserError: the model's encoder takes no such views.
    """
    needs, left_out = _needs(self, tokenizer)
    buckets = sorted(self.buckets, key=lambda x: (x.length, x.encoder_size))
    numbers: list[list[int]] = [[] for _ in buckets]
    for i in np.flatnonzero(needs.tokens >= 0).tolist():
      found = _smallest(
        buckets, needs.tokens[i], needs.views[i], needs.largest[i]
      )
      if isinstance(found, str):
        left_out[found].append(i)
      else:
        numbers[found].append(i)
    parts = (
      self._packed(bucket, np.asarray(own, int), needs)
      for bucket, own in zip(buckets, numbers, strict=True)
    )
    plan = BucketPlan(tuple(parts), needs, dict(left_out))
    if not plan.used:
      raise NoExamples(
        f"BucketedQuestions: none of {len(self.samples)} samples fits:"
        f" {plan.reasons() or 'there are none'}"
      )
    return plan

  def training(
    self, tokenizer: Any, process: int = 0, processes: int = 1
  ) -> BucketedBatches:
    """Returns endless shuffled batches; `iter()` of it can be checkpointed.

    Warns of samples that fit in no bucket.

    Raises:
      UserError: the pools of a batch do not divide among the processes.
    """
    for bucket in self.buckets:
      if bucket.rows // bucket.pool % processes:
        raise UserError(
          f"Bucket.rows: found {bucket.rows} rows in pools of {bucket.pool},"
          f" expected a multiple of {bucket.pool} rows x {processes} processes"
        )
    plan = self._warned(tokenizer)
    return bucketing.training(
      self._rows(plan, tokenizer),
      self.seed,
      process,
      processes,
      self.threads,
      plan.report(),
    )

  def evaluation(self, tokenizer: Any, limit: int | None = None) -> list[Row]:
    """Returns all rows once, in at most `limit` batches of any bucket.

    Warns of samples that fit in no bucket.
    """
    plan = self._warned(tokenizer)
    return bucketing.evaluation(self._rows(plan, tokenizer), limit)

  def rows(self, tokenizer: Any) -> Rows:
    buckets = self._rows(self.plan(tokenizer), tokenizer)
    return [unit for bucket in buckets for unit in bucket.units]

  def stream(self, tokenizer: Any) -> Any:
    """Refuses: a stream has rows of one shape.

    Raises:
      UserError: always.
    """
    raise UserError(
      "BucketedQuestions: found in a mixture of rows, expected rows of one"
      " shape; mix the samples (research.vlm.scenes.Mixed)"
    )

  def _packed(
    self, bucket: Bucket, own: Int[np.ndarray, " samples"], needs: "SampleSizes"
  ) -> "Part":
    pools = self.packing(
      needs.tokens[own],
      needs.views[own],
      bucket.length,
      bucket.views,
      bucket.pool,
    )
    numbers = own.tolist()
    return Part(
      bucket, [[[numbers[i] for i in row] for row in pool] for pool in pools]
    )

  def _warned(self, tokenizer: Any) -> "BucketPlan":
    """Returns the plan, and says what is left out."""
    plan = self.plan(tokenizer)
    if plan.left_out:
      folders.warn(
        f"{sum(map(len, plan.left_out.values())):,} of {len(self.samples):,}"
        f" samples fit in no bucket: {plan.reasons()}"
      )
    return plan

  def _rows(self, plan: "BucketPlan", tokenizer: Any) -> list[BucketRows]:
    return [
      BucketRows(
        PooledRows(self, tokenizer, part, plan.needs.view),
        part.bucket.rows // part.bucket.pool,
      )
      for part in plan.used
    ]


@dataclasses.dataclass(frozen=True)
class SampleSizes:
  """What each sample takes.

  Attributes:
    tokens: its positions in a row, -1 where the sample cannot be used.
    views: its views.
    patches: the encoder's patches of all its views.
    largest: those of its largest view; 0 where views are of one size.
    view: height and width of every view, if there is an image and views are of
      one size.
  """

  tokens: Int[np.ndarray, " samples"]
  views: Int[np.ndarray, " samples"]
  patches: Int[np.ndarray, " samples"]
  largest: Int[np.ndarray, " samples"]
  view: Size | None


@dataclasses.dataclass(frozen=True)
class Part:
  """The samples of a bucket: the rows of each pool, by the samples' numbers."""

  bucket: Bucket
  pools: list[knapsack.Pool]


@dataclasses.dataclass(frozen=True)
class BucketPlan:
  """Which samples are in which rows of which bucket, and which in none.

  Attributes:
    parts: of all buckets, from the smallest.
    needs: of all samples.
    left_out: reason -> samples, by number, that are in none for that reason.
  """

  parts: tuple[Part, ...]
  needs: SampleSizes
  left_out: Mapping[str, Sequence[int]]

  @property
  def used(self) -> list[Part]:
    """The buckets that have a sample."""
    return [part for part in self.parts if part.pools]

  def reasons(self) -> str:
    """Returns the reasons why samples are left out, how often, and one each."""
    return "; ".join(
      f"{len(found):,} {why} (the first is sample {found[0]})"
      for why, found in self.left_out.items()
    )

  def report(self) -> dict[str, Any]:
    """Returns counts and shares of each bucket, and of reasons, as JSON has it.

    `tokens`, `views` and, at native resolution, `patches` are the shares of a
    bucket's room that are used.
    """
    buckets = {str(part.bucket): self._filled(part) for part in self.parts}
    left_out = {why: len(found) for why, found in self.left_out.items()}
    return {"buckets": buckets, "left_out": left_out}

  def _filled(self, part: Part) -> dict[str, Any]:
    bucket, pools = part.bucket, part.pools
    own = [i for pool in pools for row in pool for i in row]
    rows = len(pools) * bucket.pool
    tokens = self.needs.tokens[own].sum() / max(rows * bucket.length, 1)
    views = self.needs.views[own].sum() / max(len(pools) * bucket.views, 1)
    filled = {"tokens": tokens, "views": views}
    if bucket.patches is not None:
      room = len(pools) * bucket.views * bucket.patches
      filled["patches"] = self.needs.patches[own].sum() / max(room, 1)
    shares = {k: round(float(x), 4) for k, x in filled.items()}
    return {"samples": len(own), "rows": rows, **shares}


@dataclasses.dataclass(frozen=True)
class PooledRows(Sequence[Row]):
  """The pools of a bucket, made when they are read.

  Text is `[pool, T]`; `pixels` (or what `inputs` makes of them) are uint8
  `[1, V, H, W, 3]`, the views of all samples in the order of their placeholders
  and then zeros, and absent where the bucket has no views. At native resolution
  they are `patches`, uint8 `[1, V, N, X]`, and `grids`, int32 `[1, V, 2]`.
  """

  data: BucketedQuestions
  tokenizer: Any
  part: Part
  view: Size | None

  def __len__(self) -> int:
    return len(self.part.pools)

  def __getitem__(self, index: Any) -> Row:
    bucket, rows, made = self.part.bucket, [], []
    for numbers in self.part.pools[index]:
      examples = []
      for number in numbers:
        example, views = self._read(number)
        examples.append(example)
        made += views
      rows.append(data.row_of(examples, bucket.length))
    unit = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
    pixels = self._pixels(made)
    if pixels is None:
      return unit
    used = sum(len(views.pixels) for views in made)
    inputs = self.data.inputs(pixels, used)
    return unit | {k: x[None] for k, x in inputs.items()}

  def _pixels(self, made: Sequence[Views]) -> data.ViewPixels | None:
    """Returns a pool's views and its padding, or None without room for any."""
    bucket = self.part.bucket
    if bucket.views and bucket.patches is not None:
      how = self.data.preprocessor
      return data.patches_of(made, how, bucket.views, bucket.patches)
    if not bucket.views or self.view is None:
      return None
    pixels = [view for views in made for view in views.pixels]
    padding = np.zeros((bucket.views - len(pixels), *self.view, 3), np.uint8)
    return np.stack([*pixels, *padding])

  def _read(self, number: int) -> tuple[data.Example, list[Views]]:
    """Returns a sample's tokens, and the views of each image."""
    own, sample = self.data, self.data.samples[number]
    made = [own.preprocessor.views(image) for image in sample.images]
    pieces = [own.preprocessor.pieces(views.plan) for views in made]
    example = own.example(sample, pieces, self.tokenizer)
    return example, made


def _needs(
  own: BucketedQuestions, tokenizer: Any
) -> tuple[SampleSizes, dict[str, list[int]]]:
  """Returns what each sample takes, and those of no use, by reason."""
  count, sizes = len(own.samples), set()
  native = own.preprocessor.tiling.native_square is not None
  tokens = np.full(count, -1)
  views, patches, largest = np.zeros((3, count), int)
  left_out = collections.defaultdict(list)
  for i in range(count):
    try:
      sample, images = data.outline(own.samples, i)
      plans = [own.preprocessor.plan(*size) for size in images]
    except UserError as error:
      left_out[f"cannot be read: {error}".split("\n")[0]].append(i)
      continue
    for plan in plans:
      _check_order(plan, own.preprocessor)
      if not native:
        sizes.add(plan.view)
    pieces = [own.preprocessor.pieces(plan) for plan in plans]
    example = own.example(sample, pieces, tokenizer)
    if not example.loss_mask[1:].any():
      left_out["have no answer to learn"].append(i)
      continue
    tokens[i] = len(example.tokens)
    views[i] = sum(plan.views for plan in plans)
    patches[i] = sum(plan.encoder_tokens for plan in plans)
    if native:
      largest[i] = max((plan.encoder_tokens for plan in plans), default=0)
  if len(sizes) > 1:
    raise UserError(
      f"BucketedQuestions.preprocessor: found views of {sorted(sizes)} pixels,"
      " expected one size, which the encoder takes; use a tiling of squares"
    )
  view = next(iter(sizes), None)
  return SampleSizes(tokens, views, patches, largest, view), left_out


def _check_order(plan: Plan, preprocessor: Preprocessor) -> None:
  """Raises UserError unless soft tokens are the views', one after the other."""
  if plan.row_ends or len(plan.grids) != plan.views or len(set(plan.grids)) > 1:
    raise UserError(
      f"BucketedQuestions.preprocessor: found soft tokens of grids {plan.grids}"
      f" and {plan.row_ends} ends of rows for {plan.views} views"
      f" ({type(preprocessor.tiling).__name__}), expected equal grids, one for"
      " each view"
    )


def _smallest(
  buckets: Sequence[Bucket], tokens: Any, views: Any, patches: Any
) -> int | str:
  """Returns the first bucket with room, or the reason why there is none.

  Args:
    buckets: from the smallest.
    tokens, views: of a sample.
    patches: of its largest view at native resolution, else 0.
  """
  for i, bucket in enumerate(buckets):
    room = tokens <= bucket.length and views <= bucket.views
    if room and patches <= (bucket.patches or 0):
      return i
  longest = max(bucket.length for bucket in buckets)
  most = max(bucket.views for bucket in buckets)
  finest = max(bucket.patches or 0 for bucket in buckets)
  if tokens > longest:
    return f"have more than {longest} tokens"
  if views > most:
    return f"have more than {most} views"
  if patches > finest:
    return f"have an image of more than {finest} patches"
  return "have more views than there are in a bucket of their length"
