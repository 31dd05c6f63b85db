"""Samples with any number of images: where they go, and that none sees another.

Rows of one sample (`data.ImageQuestions`) are what packed rows have to equal.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.masks import autoregressive_blocks
from research import tree
from research.data.rendering import Conversation
from research.data.sources import NoExamples
from research.nn import logits
from research.sharding import Layout
from research.training import global_batch
from research.training.objectives.objective import NextToken
from research.typing import UserError
from research.vlm import WithImages, data, masks
from research.vlm.buckets import Bucket, BucketedQuestions
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.tiling.anyres import AnyRes
from research.vlm.images.tiling.native import Native
from research.vlm.prompts.conversations import ChatSample, join_texts
from research.vlm.scenes.sample import Sample
from tests import support_vlm

TOKENIZER, IMAGE = support_vlm.ChatWords().load(), support_vlm.IMAGE
MODEL, PARAMS = support_vlm.model(), support_vlm.params()
SOFT = 4  # tokens of an image
COUNTS = (1, 0, 2, 1, 0, 3, 1, 2)  # images of each sample


def sample(number, images, question="w5", answer="w7 w8"):
  rng = np.random.default_rng(number)
  drawn = tuple(
    rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(images)
  )
  return Sample(drawn, question, answer, "", "", program={}, objects=())


SAMPLES = [
  sample(i, n, " ".join(f"w{10 + i + j}" for j in range(1 + i % 3)), f"w{i}")
  for i, n in enumerate(COUNTS)
]


def questions(*buckets, samples=SAMPLES, **changes):
  fields = dict(
    samples=samples,
    preprocessor=support_vlm.PREPROCESSOR,
    image_token=IMAGE,
    buckets=buckets,
  )
  return BucketedQuestions(**(fields | changes))


def one_each(length=20, views=3, samples=SAMPLES):
  """Returns the batch of samples in rows of their own."""
  rows = data.ImageQuestions(
    samples=samples,
    preprocessor=support_vlm.PREPROCESSOR,
    image_token=IMAGE,
    length=length,
    views=views,
    batch_size=len(samples),
  )
  (batch,) = rows.evaluation(TOKENIZER)
  return batch


# --- where samples go ------------------------------------------------------


def test_each_sample_goes_to_the_smallest_bucket_with_room():
  buckets = [
    Bucket(length=20, views=3),
    Bucket(length=9, views=1),
    Bucket(length=9, views=0),
  ]
  plan = questions(*buckets).plan(TOKENIZER)
  found = {
    str(part.bucket): sorted(
      i for pool in part.pools for row in pool for i in row
    )
    for part in plan.parts
  }
  # Answer and end are two tokens, a question one to three.
  sizes = [SOFT * n + 1 + i % 3 + 2 for i, n in enumerate(COUNTS)]
  expected = {"9 tokens, 0 views": [], "9 tokens, 1 views": []}
  expected["20 tokens, 3 views"] = []
  for i, (tokens, views) in enumerate(zip(sizes, COUNTS, strict=True)):
    if tokens <= 9 and views == 0:
      expected["9 tokens, 0 views"].append(i)
    elif tokens <= 9 and views <= 1:
      expected["9 tokens, 1 views"].append(i)
    else:
      expected["20 tokens, 3 views"].append(i)
  assert found == expected and all(found.values())
  assert list(plan.needs.tokens) == sizes


@dataclasses.dataclass(frozen=True)
class Headers(Sequence):
  """Samples of which everything is known but the pixels."""

  sizes: tuple = ((16, 16), (9, 30), (-1, 4), (16, 16))

  def __len__(self):
    return len(self.sizes)

  def __getitem__(self, index):
    raise AssertionError("pixels were read")

  def outline(self, index):
    height, width = self.sizes[index]
    if height < 0:
      raise UserError("bad.png: no image\nremove it")
    answer = "w7" if index < 3 else ""
    return sample(0, 0, answer=answer), ((height, width),) * (1 + index)


def test_plans_read_no_pixels_and_count_what_fits_in_none():
  """Images beyond a bucket's room, damaged ones, and nothing to learn."""
  template = data.Template(answer="{answer}", end=False)
  plan = questions(
    Bucket(length=10, views=1), samples=Headers(), template=template
  ).plan(TOKENIZER)
  assert plan.left_out == {
    "have more than 1 views": [1],
    "cannot be read: bad.png: no image": [2],
    "have no answer to learn": [3],
  }
  assert plan.report()["buckets"]["10 tokens, 1 views"]["samples"] == 1
  assert plan.report()["left_out"]["have no answer to learn"] == 1
  with pytest.raises(NoExamples, match="none of 4 samples fits: .* bad.png"):
    questions(
      Bucket(length=3, views=1), samples=Headers(), template=template
    ).plan(TOKENIZER)


def test_a_sample_that_no_bucket_has_both_for_is_said_to_be_so(capsys):
  buckets = Bucket(length=30, views=1), Bucket(length=9, views=3)
  plan = questions(*buckets).plan(TOKENIZER)
  reason = "have more views than there are in a bucket of their length"
  assert plan.left_out == {reason: [2, 5, 7]}
  questions(*buckets).training(TOKENIZER)
  said = capsys.readouterr().err
  assert f"3 of 8 samples fit in no bucket: 3 {reason}" in said
  assert "the first is sample 2" in said


class AnySize(Native):
  """A tiling that says that its views are of one size, and makes others."""

  native_square = None


@pytest.mark.parametrize(
  "tiling, message",
  [
    (AnyRes(tile=16, canvases=((16, 32),), patch=4), "ends of rows for 3"),
    (
      AnySize(patch=4, merge=1, min_pixels=16, max_pixels=4096),
      "expected one size",
    ),
  ],
  ids=["anyres", "any size"],
)
def test_views_that_the_encoder_does_not_take_are_refused(tiling, message):
  samples = [
    sample(0, 1),
    dataclasses.replace(
      sample(1, 0), images=(np.zeros((40, 24, 3), np.uint8),)
    ),
  ]
  own = questions(
    Bucket(length=600, views=9),
    samples=samples,
    preprocessor=Preprocessor(tiling),
  )
  with pytest.raises(UserError, match=message):
    own.plan(TOKENIZER)


def test_buckets_that_make_no_sense_are_refused():
  with pytest.raises(UserError, match="expected a multiple of pool, 3"):
    Bucket(length=8, rows=4, pool=3)
  with pytest.raises(UserError, match="at least one, and none twice"):
    questions(Bucket(length=8), Bucket(length=8))
  with pytest.raises(UserError, match="expected a multiple of 2 rows x 2"):
    questions(Bucket(length=20, views=3, rows=2, pool=2)).training(
      TOKENIZER, 0, 2
    )


# --- what is in a row ------------------------------------------------------


@pytest.mark.parametrize("pool", [1, 2])
def test_a_packed_row_has_whole_samples_and_their_views_in_order(pool):
  (part,) = (
    questions(Bucket(length=24, views=4, pool=pool, rows=4))
    .plan(TOKENIZER)
    .parts
  )
  whole = one_each()
  rows = questions(Bucket(length=24, views=4, pool=pool, rows=4)).rows(
    TOKENIZER
  )
  assert max(len(row) for pool in part.pools for row in pool) > 1
  for unit, numbers in zip(rows, part.pools, strict=True):
    views = iter(unit["pixels"][0])
    for row, own in enumerate(numbers):
      for segment, number in enumerate(own):
        here = unit["segments"][row] == segment
        alone = whole["segments"][number] >= 0
        for name in ("tokens", "targets", "weights", "positions"):
          np.testing.assert_array_equal(
            unit[name][row][here], whole[name][number][alone]
          )
        for k in range(COUNTS[number]):
          np.testing.assert_array_equal(next(views), whole["pixels"][number][k])
    assert not any(view.any() for view in views)


@functools.cache
def compiled():
  """Returns loss and gradients, by a mask that is data."""

  def loss(params, batch, mask):
    pool = len(batch["tokens"]) // len(batch["pixels"])
    language = MODEL.with_images(params, batch["pixels"], pool)
    return NextToken(MODEL.language, mask=lambda _: mask)(
      language, batch, None
    )[0]

  return jax.jit(jax.value_and_grad(loss))


def mask_of(policy, batch):
  batch = jax.tree.map(jnp.asarray, batch)
  if isinstance(policy, masks.Causal):
    # The same pairs, as an array of intervals like those of the others.
    ones = jnp.ones_like(batch["tokens"])
    return autoregressive_blocks(ones, segments=batch["segments"])
  return policy.of_rows(batch)


def batch_of(bucket, **changes):
  (batch,) = questions(bucket, **changes).evaluation(TOKENIZER)
  return batch


def assert_close(found, expected):
  """Sums over a short model in another order, by each array's largest."""
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  for x, y in pairs:
    # Biases of keys change no softmax: their gradients are rounding.
    size = 0.3 + np.abs(y).max()
    np.testing.assert_allclose(x / size, y / size, rtol=0, atol=5e-5)


POLICIES = (
  masks.Causal(),
  masks.BidirectionalPrompt(),
  masks.BidirectionalImages(image_token=IMAGE),
)
PACKED = Bucket(length=24, views=6, pool=2, rows=4)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda x: type(x).__name__)
def test_packed_is_unpacked_in_loss_and_gradient(policy):
  """By tower; rows share views, and have samples without images."""
  packed, whole = batch_of(PACKED), one_each()
  assert packed["tokens"].shape == (4, 24) and len(packed["pixels"]) == 2
  found = compiled()(PARAMS, packed, mask_of(policy, packed))
  expected = compiled()(PARAMS, whole, mask_of(policy, whole))
  for tower in ("vision", "connector", "language"):
    assert_close(found[1][tower], expected[1][tower])
    assert max(np.abs(x).max() for x in jax.tree.leaves(found[1][tower])) > 0.1
  np.testing.assert_allclose(found[0], expected[0], rtol=2e-5)
  # Without segments it is another loss, so the comparison can fail.
  leaking = packed | {"segments": packed["segments"] * 0}
  other = compiled()(PARAMS, packed, mask_of(policy, leaking))
  assert abs(other[0] - found[0]) > 1e-2


def chat(number, *turns):
  """Returns a conversation of texts with images between, and answers."""
  roles = ("user", "assistant")
  messages = [
    {"role": role, "content": join_texts(texts)}
    for turn in turns
    for role, texts in zip(roles, turn, strict=True)
  ]
  images = sum(len(texts) - 1 for texts, _ in turns)
  drawn = sample(number, images).images
  return ChatSample(drawn, Conversation(messages, f"x:{number}"))


CHATS = [
  chat(i, (["", ""], [f"w{i}"]), *[(["w20", ""], [""])] * (i % 2))
  for i in range(8)
]
"""One turn of 8 tokens; or two of 8, the second with an empty answer."""


@pytest.mark.parametrize("policy", POLICIES, ids=lambda x: type(x).__name__)
def test_packed_conversations_are_unpacked_ones(policy):
  packed = batch_of(PACKED, samples=CHATS)
  whole = one_each(samples=CHATS)
  assert (packed["segments"] >= 0).all()  # four rows of 16 + 8
  assert packed["tokens"].shape == (4, 24) and len(packed["pixels"]) == 2
  learned = whole["targets"][1][whole["weights"][1] > 0]
  np.testing.assert_array_equal(learned, [1, 65, 65])
  found = compiled()(PARAMS, packed, mask_of(policy, packed))
  expected = compiled()(PARAMS, whole, mask_of(policy, whole))
  assert_close(found[1], expected[1])
  np.testing.assert_allclose(found[0], expected[0], rtol=2e-5)


def test_a_conversation_is_whole_or_left_out():
  """Its images are not cut where it is longer than a row."""
  plan = questions(Bucket(length=15, views=6), samples=CHATS).plan(TOKENIZER)
  assert plan.left_out == {"have more than 15 tokens": [1, 3, 5, 7]}


def test_the_objective_has_the_models_mask_in_packed_rows():
  """A row with views of its own; the mask by index, as runs have it."""
  packed = batch_of(Bucket(length=24, views=4, rows=4))
  found, weight, sums = jax.jit(WithImages(MODEL))(PARAMS, packed, None)
  whole = one_each()
  expected, _ = compiled()(PARAMS, whole, mask_of(masks.Causal(), whole))
  np.testing.assert_allclose(found, expected, rtol=2e-5)
  assert weight == whole["weights"].sum() == 2 * len(SAMPLES)
  assert packed["pixels"].shape == (4, 4, 16, 16, 3)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda x: type(x).__name__)
def test_no_sample_sees_anothers_images(policy):
  """Bitwise: others' views are other pixels, and padded ones are noise."""
  bucket = PACKED
  (part,) = questions(bucket).plan(TOKENIZER).parts
  packed = batch_of(bucket)
  mask = mask_of(policy, packed)
  views = [i for pool in part.pools for row in pool for i in row]
  for number in (2, 7):
    pool = next(p for p, x in enumerate(part.pools) if number in sum(x, []))
    order = sum(part.pools[pool], [])
    row = next(r for r, x in enumerate(part.pools[pool]) if number in x)
    segment = part.pools[pool][row].index(number)
    here = packed["segments"] == segment
    here &= (np.arange(4) == pool * 2 + row)[:, None]
    alone = packed | {"weights": packed["weights"] * here}
    first = sum(COUNTS[i] for i in order[: order.index(number)])
    mine = np.zeros(packed["pixels"].shape[:2], bool)
    mine[pool, first : first + COUNTS[number]] = True
    pixels = packed["pixels"]
    others = np.where(mine[..., None, None, None], pixels, pixels ^ 255)
    own = np.where(mine[..., None, None, None], pixels ^ 255, pixels)
    base = compiled()(PARAMS, alone, mask)
    same = compiled()(PARAMS, alone | {"pixels": others}, mask)
    assert base[0] == same[0]
    for path, x in tree.flatten_paths(base[1]["connector"]):
      y = dict(tree.flatten_paths(same[1]["connector"]))[path]
      np.testing.assert_array_equal(x, y)
    changed = compiled()(PARAMS, alone | {"pixels": own}, mask)
    assert abs(changed[0] - base[0]) > 1e-3
  assert sorted(views) == list(range(len(SAMPLES)))


@pytest.mark.slow
def test_a_mesh_cuts_pools_and_never_views():
  packed = batch_of(PACKED)
  loss = jax.jit(lambda *x: WithImages(MODEL)(*x, None)[0])
  expected = loss(PARAMS, packed)
  layout = Layout(data=2, sequence=2)
  mesh = layout.mesh(jax.devices()[:4])
  with jax.set_mesh(mesh):
    params = jax.device_put(PARAMS, layout.shardings(PARAMS, mesh))
    placed = global_batch.to_global(packed, layout.batch(mesh))
    shapes = {k: x.sharding.shard_shape(x.shape) for k, x in placed.items()}
    assert shapes["tokens"] == (2, 12)
    assert shapes["pixels"] == (1, *packed["pixels"].shape[1:])
    np.testing.assert_allclose(loss(params, placed), expected, rtol=2e-5)
    with pytest.raises(UserError, match="batch: pixels: found 1 rows"):
      global_batch.to_global(
        packed | {"pixels": packed["pixels"][:1]}, layout.batch(mesh)
      )


@pytest.mark.slow
def test_text_alone_is_the_bare_language_model():
  """In a bucket without views, and in rows next to those with images."""
  text = [x for x in SAMPLES if not x.images]
  bucket = Bucket(length=12, views=0, rows=1)
  batch = jax.tree.map(jnp.asarray, batch_of(bucket, samples=text))
  assert "pixels" not in batch
  found, _, _ = WithImages(MODEL)(PARAMS, batch, None)
  language = PARAMS["language"]
  expected, _, _ = NextToken(MODEL.language)(language, batch, None)
  assert found == expected
  whole = one_each()
  rows = jnp.array([i for i, n in enumerate(COUNTS) if not n])
  tokens = jnp.asarray(whole["tokens"])
  sees = MODEL.with_images(PARAMS, jnp.asarray(whole["pixels"]))
  found = logits(MODEL.language, sees, tokens)
  expected = logits(MODEL.language, language, jnp.where(tokens < 67, tokens, 0))
  np.testing.assert_array_equal(found[rows], expected[rows])
