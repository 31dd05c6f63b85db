"""Batches that are cut to a random length, and rows filled up with ends."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data import packing
from research.diffusion.batch_transforms import PadWithEOS, RandomTruncation
from research.diffusion.objective import MaskedDiffusion
from tests import support

V, T = 16, 8
MASK, END = V - 1, V - 2


@functools.cache
def network():
  model = support.model(depth=1, width=16, hidden=16, head_dim=8, vocab=V)
  return model, support.params(model)


def batch(lengths, prompt=0):
  """Returns rows of one example each, laid by the packing itself."""
  rng = np.random.default_rng(0)
  tokens = [rng.integers(0, END, n).astype(np.int32) for n in lengths]
  learned = [np.arange(n) >= prompt for n in lengths]
  rows = packing.pack(tokens, T, packing.one_per_row, learned)
  found = [rows[i] for i in range(len(rows))]
  return {k: jnp.asarray(np.stack([r[k] for r in found])) for k in found[0]}


def test_one_batch_in_so_many_is_short_and_every_length_as_likely():
  n, chance = 4000, 0.25
  given = batch([T, T])
  f = jax.jit(
    jax.vmap(lambda k: RandomTruncation(chance=chance)(given, k)["segments"])
  )
  found = np.asarray(f(jax.random.split(jax.random.key(0), n))) >= 0
  size = found.sum(-1)
  assert (found == (np.arange(T) < size[..., None])).all()
  assert (size[:, 0] == size[:, 1]).all()  # a batch has one length
  share = np.bincount(size[:, 0], minlength=T + 1)[1:] / n
  want = np.full(T, chance / T)
  want[-1] += 1 - chance
  assert (abs(share - want) < 4.5 * np.sqrt(want * (1 - want) / n)).all()


@pytest.mark.slow
def test_a_short_batch_is_one_of_short_rows():
  """Loss and weight are those of rows that end there."""
  model, params = network()
  given, cut = batch([T, T, T]), 3
  key = jax.random.key(1)
  ours = MaskedDiffusion(
    model=model, mask_id=MASK, batch_transforms=(RandomTruncation(chance=1.0),)
  )
  plain = MaskedDiffusion(model=model, mask_id=MASK)
  whole = jax.jit(RandomTruncation(chance=1.0))
  keys = [jax.random.key(i) for i in range(40)]
  sizes = [int((whole(given, k)["segments"][0] >= 0).sum()) for k in keys]
  key = keys[sizes.index(cut)]
  here = jnp.arange(T) < cut
  short = given | {
    "segments": jnp.where(here, 0, -1),
    "positions": jnp.where(here, given["positions"], -1),
  }
  short["segments"] = jnp.broadcast_to(short["segments"], (3, T))
  # What was cut off is not read, whatever it was.
  short["tokens"] = jnp.where(here, given["tokens"], 5)
  got, want = (
    jax.jit(ours)(params, given, key),
    jax.jit(plain)(params, short, key),
  )
  chex.assert_trees_all_close(got, want, rtol=1e-6)
  assert float(got[1]) == 3 * cut
  assert RandomTruncation()(given, None) is given  # evaluation reads all of it


@pytest.mark.parametrize(
  ("change", "want"),
  [
    (dict(), [6, 6, 6]),  # LLaDA: the longest of the batch
    (dict(multiple=4), [8, 8, 8]),
    (dict(multiple=4, per_row=True), [4, 8, 8]),
    (dict(multiple=T), [8, 8, 8]),
  ],
  ids=str,
)
def test_rows_are_filled_up_with_ends_that_are_learned(change, want):
  prompt, lengths = 2, [3, 6, 5]
  got = jax.jit(PadWithEOS(end=END, **change))(batch(lengths, prompt), None)
  how = MaskedDiffusion(mask_id=MASK, noise="learned")
  for i, (own, size) in enumerate(zip(lengths, want, strict=True)):
    row = {k: np.asarray(v[i]) for k, v in got.items()}
    assert (row["tokens"][own:size] == END).all()
    assert (row["tokens"][:own] != END).all()
    np.testing.assert_array_equal(row["positions"][:size], np.arange(size))
    np.testing.assert_array_equal(row["segments"] >= 0, np.arange(T) < size)
    # Property 11: prompts are never masked, ends may be.
    maskable = np.asarray(how.maskable(got))[i]
    place = np.arange(T)
    np.testing.assert_array_equal(maskable, (place >= prompt) & (place < size))
    np.testing.assert_array_equal(
      row["targets"][: size - 1], row["tokens"][1:size]
    )


@pytest.mark.slow
def test_ends_count_in_an_answer_s_length():
  """LLaDA's loss: each row's mean over answer and ends, then over rows."""
  model, params = network()
  given = batch([3, 6], 2)
  ours = MaskedDiffusion(
    model=model,
    mask_id=MASK,
    noise="learned",
    norm="sequence",
    batch_transforms=(PadWithEOS(end=END),),
  )
  full = PadWithEOS(end=END)(given, None)
  plain = MaskedDiffusion(model=model, mask_id=MASK, noise="learned")
  key = jax.random.key(3)
  loss, weight, _ = jax.jit(ours)(params, given, key)
  each = []
  f = jax.jit(plain)
  for i in range(2):
    # One row's share of the batch, by weights of the others' answers.
    alone = dict(full)
    alone["weights"] = full["weights"].at[1 - i].set(0)
    each.append(f(params, alone, key)[0] / 4)  # places 2 to 5
  assert float(weight) == 2
  np.testing.assert_allclose(loss, sum(each), rtol=1e-5)


def test_rows_that_only_fill_up_a_batch_stay_empty():
  given = batch([3, 6])
  blank = {
    k: v.at[1].set(-1 if k in ("positions", "segments") else 0)
    for k, v in given.items()
  }
  got = PadWithEOS(end=END, multiple=T)(blank, None)
  assert (got["segments"][0] == 0).all() and (got["segments"][1] == -1).all()
  assert not got["weights"][1].any()
