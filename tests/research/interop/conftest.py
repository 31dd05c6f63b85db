"""What tests of directories share."""

import functools

import pytest

from research.interop import convert
from tests.support_hf_quant import WRITERS, plain


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Returns the directory that a writer has made of a tiny model."""
  folder = tmp_path_factory.mktemp("quantized")

  @functools.cache
  def make(name, square=False):
    to = folder / f"{name}-{square}"
    convert.to_quantized(plain(square), to, WRITERS[name], True)
    return to

  return make
