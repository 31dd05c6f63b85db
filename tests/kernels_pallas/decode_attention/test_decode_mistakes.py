"""Invalid calls of paged attention raise before anything runs."""

import inspect

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from kernels_pallas.decode_attention.api import (
  decode_attention,
  paged_attention,
)
from tests.support_decode import (
  COUNT,
  LENS,
  SIZE,
  STARTS,
  TOKENS,
  B,
  S,
  draw,
  pool,
  tables,
)

# Without the annotations' checks, which users do not have.
PAGED, CACHED = map(inspect.unwrap, (paged_attention, decode_attention))
R, W = tables().shape
GOOD = {"q": draw(TOKENS, 4, 8), "pages": pool(2, 8, 8), "table": tables(),
        "kv_lens": LENS, "cu_q_lens": STARTS}  # fmt: skip


def damaged(name, place, value):
  """Returns the argument of that name, with one value replaced."""
  array = np.array(GOOD[name])
  array[place] = value
  return {name: array}, name


@st.composite
def mistakes(draw_):
  """Invalid arguments, and the name that the message must contain."""
  pick = lambda *values: draw_(st.sampled_from(values))  # noqa: E731
  row = draw_(st.sampled_from(np.flatnonzero(LENS).tolist()))
  first = draw_(st.integers(0, (LENS[row] - 1) // SIZE))
  outside = draw_(st.integers(-9, 9).filter(bool))
  outside = outside - (outside > 0) + (COUNT if outside > 0 else 0)
  name = pick("table", "kv_lens", "cu_q_lens")
  wrong = {
    "page outside": lambda: damaged("table", (row, first), outside),
    "longer than its pages": lambda: damaged(
      "kv_lens", row, W * SIZE + draw_(st.integers(1, 2**30))),
    "negative length": lambda: damaged(
      "kv_lens", row, draw_(st.integers(-(2**31), -1))),
    "starts that fall": lambda: damaged("cu_q_lens", R - 1, TOKENS + 1),
    "starts beyond": lambda: damaged("cu_q_lens", R, TOKENS + pick(1, 99)),
    "starts before": lambda: damaged("cu_q_lens", 0, pick(-1, -99)),
    "floats": lambda: ({name: np.float32(GOOD[name])}, name),
    "another axis": lambda: ({name: np.array(GOOD[name])[None]}, name),
    "rows": lambda: ({"table": tables()[: pick(*range(R))]}, "table"),
    "starts": lambda: ({"cu_q_lens": STARTS[: pick(*range(R))]}, "cu_q_lens"),
    "whole queries": lambda: ({"q": np.zeros((TOKENS, 4, 8), np.int8)}, "q"),
    "a batch": lambda: ({"q": draw(1, TOKENS, 4, 8)}, "q"),
    "heads": lambda: ({"q": draw(TOKENS, pick(1, 3, 5), 8)}, "q"),
    "depth": lambda: ({"q": draw(TOKENS, 4, pick(4, 7, 16))}, "q"),
    "sinks": lambda: ({"sinks": draw(pick(1, 3, 5))}, "sinks"),
    "window": lambda: ({"window": pick(0, -1)}, "window"),
    "softcap": lambda: ({"softcap": pick(0.0, -1.0, np.nan)}, "softcap"),
    "backend": lambda: ({"backend": draw_(st.text(max_size=9))}, "backend"),
  }  # fmt: skip
  return wrong[draw_(st.sampled_from(sorted(wrong)))]()


@hypothesis.settings(max_examples=300)
@hypothesis.given(mistake=mistakes())
def test_invalid_arguments_raise_before_anything_runs(mistake):
  """While the program is traced, with a message that names the argument."""
  arguments, named = mistake
  with pytest.raises(ValueError, match=rf"\b{named}"):
    jax.eval_shape(lambda: PAGED(**GOOD | arguments))


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.uint32])
def test_values_of_any_integers_are_checked(dtype):
  """Also where differences would wrap around."""
  starts = np.array([0, 1, 7, 6, 11, 12, 13], dtype)
  lens = np.array([7, 6, 0, 6, 13, 1], dtype)
  with pytest.raises(ValueError, match="cu_q_lens: row 2 starts at 7 and"):
    PAGED(**GOOD | {"kv_lens": lens, "cu_q_lens": starts})
  table, _ = damaged("table", (0, 1), COUNT)
  where = {"kv_lens": LENS.astype(dtype), "cu_q_lens": STARTS.astype(dtype)}
  with pytest.raises(ValueError, match=f"table: row 0 has page {COUNT}"):
    PAGED(**GOOD | table | where, window=9)


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"q": np.zeros((B, 2, 8), np.int32)}, "q: found int32"),
    ({"q": np.zeros((B, 1, 2, 8), np.float32)}, "q: found float32"),
    ({"k": np.zeros((B, S, 2, 8), np.int8)}, "k: found int8"),
    ({"v": np.zeros((B, S, 2), np.float32)}, "v: found float32"),
    ({"v": np.zeros((B, S, 1, 8), np.float32)}, "found q"),
    ({"lengths": np.ones(B, np.float32)}, "kv_lens: found float32"),
    ({"lengths": np.full(B, S + 1)}, "kv_lens: row 0"),
    ({"lengths": np.ones(B + 1, np.int32)}, "lengths"),
  ],
)
def test_invalid_arguments_with_a_cache_raise(change, named):
  good = {"q": draw(B, 2, 8), "k": draw(B, S, 2, 8), "v": draw(B, S, 2, 8),
          "lengths": np.ones(B, np.int32)}  # fmt: skip
  with pytest.raises(ValueError, match=named):
    jax.eval_shape(lambda: CACHED(**good | change))
