"""Tests the command-line form of KV quantization, valid and invalid."""

import pytest

from research.quant.kv.kv_quantizer import KVQuantizer, parse
from research.typing import UserError


@pytest.mark.parametrize(
  "text, fields",
  [
    ("k4v4", {}),
    ("k8v2", dict(bits_k=8, bits_v=2)),
    ("k16vfp8", dict(bits_k=16, bits_v="fp8")),
    ("int8", dict(bits_k="int8", bits_v="int8")),
    ("4,residual=0,group=64", dict(group=64, residual=0)),
    ("k4v4,key=hadamard+per_token", dict(key="hadamard+per_token")),
    (
      "k2v4,less_bias=true,sink_tokens=4,scale_dtype=float32",
      dict(bits_k=2, less_bias=True, sink_tokens=4, scale_dtype="float32"),
    ),
  ],
)
def test_short_forms(text, fields):
  assert parse(text) == KVQuantizer(**fields)


def test_settings_per_layer():
  found = parse("k2v2;0,29=k8v4,residual=0;3=int8,key=per_token")
  assert found.default == parse("k2v2")
  assert (
    found.for_layers([29]) == found.for_layers([0]) == parse("k8v4,residual=0")
  )
  assert found.for_layers([3]) == parse("int8,key=per_token")
  assert found.for_layers(range(4, 9)) == found.default
  with pytest.raises(UserError, match="layers 2 to 4 with different"):
    found.for_layers(range(2, 5))
  assert parse("k2v2").for_layers(range(9)) == parse("k2v2")


def test_no_text_is_no_quantizer():
  assert parse("") is None


@pytest.mark.parametrize(
  "text, words",
  [
    ("k3v4", "kv=k3v4: found 'k3v4', expected bits.*k8v4"),
    ("v4k4", "found 'v4k4'"),
    ("k4", "found 'k4'"),
    ("k4v4,", "found '', expected one of key, value, group"),
    ("k4v4,resid=3", "found 'resid=3'.*e.g. residual=128"),
    ("k4v4,bits_k=8", "found 'bits_k=8'"),
    ("k4v4,residual=x", "residual=x, expected a number"),
    ("k4v4,residual=-32", "residual=-32, expected a number"),
    ("k4v4,less_bias=1", "less_bias=1, expected true or false"),
    ("k4v4;0-3=k8v8", "found '0-3=k8v8', expected layers"),
    ("k4v4;k8v8", "found 'k8v8', expected layers"),
    ("k4v4;0=k8v8;1,0=k2v2", "found layer 0 twice"),
    ("k4v4;0=k9v9", "found 'k9v9'"),
    ("k4v4,group=0", "KVQuantizer.group: found 0, expected at least 1"),
    ("k4v4,residual=48", "residual: found 48, expected a multiple.*32"),
    ("k4v4,key=channel", "KVQuantizer.key: found 'channel', expected per_ch"),
  ],
)
def test_bad_texts_are_refused(text, words):
  with pytest.raises(UserError, match=words):
    parse(text)


def test_layers_that_a_model_has_not_are_refused():
  kv = parse("k4v4;0,29=k8v8")
  kv.check_depth(30)
  with pytest.raises(UserError, match="found layer 29, expected 0 to 28"):
    kv.check_depth(29)


def test_single_tokens_need_no_whole_groups_of_recent_ones():
  kv = parse("k4v4,key=per_token,residual=5")
  assert not any(grid.per_channel for grid in kv.grids)
