"""Llama's Transformer in NumPy, float64: a reference without shared code.

Visibility is a table of booleans, positions are numbers, and a row's time is a
number; so tests specify all three independently of the code under test.
"""

import jax
import numpy as np


def silu(x):
  return x / (1 + np.exp(-x))


def norm(x, scale):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def rotated(x, place):
  """Returns heads `[B, T, N, H]`, halves rotated by positions `[B, T]`."""
  half = x.shape[-1] // 2
  angle = place[..., None] * 10_000 ** (-np.arange(half) / half)
  cos, sin = np.cos(angle)[:, :, None], np.sin(angle)[:, :, None]
  a, b = x[..., :half], x[..., half:]
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def conditioning(model, p, time):
  """Returns `[B, T or 1, C]` of times in MDLM's form, `-log(1 - 0.999 t)`."""
  half = model.time_embedding.features // 2
  s = -np.log(1 - (1 - 1e-3) * np.asarray(time, np.float64))
  s = s[:, None] if s.ndim == 1 else s
  angle = s[..., None] * 10_000 ** (-np.arange(half) / half)
  c = np.concatenate([np.cos(angle), np.sin(angle)], -1)
  c = silu(c @ p["clock"]["enter"] + p["clock"]["enter_bias"])
  return silu(c @ p["clock"]["leave"] + p["clock"]["leave_bias"])


def modulation(c, p, n):
  """Returns n maps of `conditioning`; zeros for a model without."""
  if c is None:
    return [0.0] * n
  return np.split(c @ p["weight"] + p["weight_bias"], n, -1)


def attention(kind, w, h, place, seen):
  q, k, v = (
    (h @ w[name]).reshape(*h.shape[:2], -1, kind.head_dim) for name in "qkv"
  )
  q, k = rotated(q, place), rotated(k, place)
  k, v = (np.repeat(z, kind.heads // kind.kv_heads, 2) for z in (k, v))
  z = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(kind.head_dim)
  z = np.where(seen[:, None], z, -1e30)
  z = np.exp(z - z.max(-1, keepdims=True))
  z = np.where(seen[:, None], z, 0)
  z = z / np.maximum(z.sum(-1, keepdims=True), 1e-300)
  return np.einsum("bhts,bshd->bthd", z, v).reshape(*h.shape[:2], -1) @ w["o"]


def layers(params):
  """Yields each layer's arrays; a run has layers `[N, ...]` of one kind."""
  names = [name for name in params if name.startswith("run")]
  for name in sorted(names, key=lambda name: int(name[3:])):
    run = params[name]["layer0"]
    for i in range(len(run["attention_norm"]["scale"])):
      yield jax.tree.map(lambda leaf, i=i: leaf[i], run)


def states(model, params, x, place, seen, time=None):
  """Returns the final states `[B, T, D]`.

  Args:
    model: A model of `support.model`, of Llama's family.
    params: Its parameters.
    x: Tokens `[B, T]`, or their embeddings `[B, T, D]`.
    place: Positions `[B, T]`.
    seen: Bool `[B, T, T]`: whether a query (first) sees a key. Without visible
      keys the result is 0.
    time: `[B]` or `[B, T]`, for a model that is conditioned on it.
  """
  p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
  x, place = np.asarray(x), np.asarray(place)
  x = p["embed"][x] if x.ndim == 2 else x.astype(np.float64)
  c = None if time is None else conditioning(model, p, time)
  for kind, w in zip(model.layer_kinds(), layers(p), strict=True):
    shift, scale, gate = modulation(c, w.get("attention_modulation"), 3)
    h = norm(x, w["attention_norm"]["scale"]) * (1 + scale) + shift
    found = attention(kind.attention, w["attention"], h, place, seen)
    x = x + (1 + gate) * found
    shift, scale, gate = modulation(c, w.get("mlp_modulation"), 3)
    h = norm(x, w["mlp_norm"]["scale"]) * (1 + scale) + shift
    w = w["mlp"]
    x = x + (1 + gate) * ((silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"])
  shift, scale = modulation(c, p.get("final_modulation"), 2)
  return norm(x, p["final_norm"]["scale"]) * (1 + scale) + shift


def logits(model, params, x, place, seen, time=None):
  """Returns logits `[B, T, V]`; see `states`."""
  head = params.get("head")
  head = params["embed"].T if head is None else head
  found = states(model, params, x, place, seen, time)
  return found @ np.asarray(head, np.float64)
