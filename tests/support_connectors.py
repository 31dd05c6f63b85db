"""What transformers' connectors compute: tests/golden/make_connectors.py."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import vlm_weights  # noqa: E402


def golden(name: str) -> tuple[dict, dict]:
  """Returns the tensors and the arrays of `name`, fp32 and int32."""
  folder = GOLDEN / "connectors" / name
  shapes = json.loads((folder / "tensors.json").read_text())
  tensors = {k: vlm_weights.draw(k, tuple(s)) for k, s in shapes.items()}
  with np.load(folder / "golden.npz") as file:
    return tensors, {k: jnp.asarray(x) for k, x in file.items()}


def linear(tensors: dict, theirs: str, ours: str) -> dict[str, jax.Array]:
  """Returns the matrix of a torch Linear and its bias, if it has one."""
  out = {ours: jnp.asarray(tensors[f"{theirs}.weight"].T)}
  if f"{theirs}.bias" in tensors:
    out[f"{ours}_bias"] = jnp.asarray(tensors[f"{theirs}.bias"])
  return out


def norm(tensors: dict, theirs: str) -> dict[str, jax.Array]:
  """Returns the scale of a norm and its bias, if it has one."""
  out = {"scale": jnp.asarray(tensors[f"{theirs}.weight"])}
  if f"{theirs}.bias" in tensors:
    out["bias"] = jnp.asarray(tensors[f"{theirs}.bias"])
  return out


def assert_close(found, expected):
  """Products of fp32, a few layers of them: 1e-5 of the largest value."""
  scale = np.abs(expected).max()
  np.testing.assert_allclose(
    np.asarray(found) / scale, expected / scale, atol=1e-5
  )
