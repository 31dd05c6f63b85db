"""Forecasts as text."""

import pytest

from research.planning import text


def test_a_program_that_the_compiler_refuses_does_not_fit():
  # As libtpu says it.
  found = text.parse_out_of_memory(
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM,"
    " the total memory required for HLO temporaries (24.00G) exceeds available"
    " HBM (15.75G). HLO module: jit_f.\nSee elsewhere."
  )
  limit = int(15.75 * 2**30)
  assert found == {
    "fits": False,
    "total_bytes": 24 * 2**30,
    "limit_bytes": limit,
  }
  assert "24 GiB of 15.8 GiB: DOES NOT FIT" in text.describe_out_of_memory(
    found
  )


def test_an_error_in_other_words_is_shown():
  found = text.parse_out_of_memory("RESOURCE_EXHAUSTED: no room\nat all")
  assert not found["fits"]
  assert (
    "RESOURCE_EXHAUSTED: no room: DOES NOT FIT"
    in text.describe_out_of_memory(found)
  )


@pytest.mark.parametrize(
  "nbytes, words",
  [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3 TiB")],
)
def test_bytes_have_units(nbytes, words):
  assert text.format_bytes(nbytes) == words
