"""Makes attention.json: golden vectors of attention, in float64 with numpy.

Independent of the code under test: loops over queries, the formulas of Dao et
al. 2022 (appendix B) written out for one query at a time. Inputs are sines, so
that nothing but this rule has to be shared: element t (from 1, C order) is
sin(a t + b). Run: `python tests/golden/make_attention.py`.
"""

import json
import math
import pathlib

import numpy as np

# name: (B, T, S, N, K, H, Hv), features
CASES = {
  "full": ((1, 4, 6, 1, 1, 4, 4), {"causal": False}),
  "causal": ((1, 4, 6, 1, 1, 4, 4), {}),
  "causal_top_left": ((1, 4, 6, 1, 1, 4, 4), {"offset": 0}),
  "empty_rows": ((1, 6, 4, 1, 1, 4, 4), {}),
  "window": ((1, 8, 8, 2, 1, 4, 4), {"left": 2}),
  "gqa": ((2, 5, 7, 4, 2, 8, 8), {}),
  "other_value_dim": ((1, 5, 5, 2, 2, 8, 4), {}),
  "softcap": ((1, 5, 5, 2, 2, 8, 8), {"softcap": 2.0}),
  "softcap_bias": ((1, 5, 5, 2, 2, 8, 8), {"softcap": 2.0, "bias": True}),
  "sinks": ((1, 5, 5, 4, 2, 8, 8), {"sinks": True}),
  "dropout": ((1, 5, 5, 2, 2, 8, 8), {"dropout": True}),
  "lse_cotangent": ((1, 5, 5, 2, 2, 8, 8), {"dlse": True}),
  "everything": (
    (2, 5, 7, 4, 2, 8, 4),
    {
      "softcap": 2.0,
      "bias": True,
      "sinks": True,
      "dropout": True,
      "dlse": True,
    },
  ),
}


def wave(a, b, *shape):
  """sin(a t + b), t = 1, 2, ... in C order."""
  n = math.prod(shape)
  return np.sin(a * np.arange(1, n + 1) + b).reshape(shape)


def inputs(dims):
  """q, k, v, do, bias, sinks, dropout multiplier, cotangent of the lse."""
  B, T, S, N, K, H, Hv = dims
  count = np.arange(B * N * T * S).reshape(B, N, T, S)
  return {
    "q": wave(0.37, 0.0, B, T, N, H),
    "k": wave(0.61, 0.5, B, S, K, H),
    "v": wave(0.83, 1.0, B, S, K, Hv),
    "do": wave(0.29, 0.25, B, T, N, Hv),
    "bias": np.sin(0.17 * np.arange(N * T * S)).reshape(1, N, T, S),
    "sinks": np.cos(np.arange(N)),
    "dropout": ((count * 7919 % 10) < 8) / 0.8,
    "dlse": np.sin(0.11 * np.arange(B * N * T)).reshape(B, N, T),
  }


def attention(dims, options):
  """Outputs and gradients, one query at a time."""
  B, T, S, N, K, H, _ = dims
  x = inputs(dims)
  cap, scale = options.get("softcap"), H**-0.5
  offset = options.get("offset", S - T)
  out = {
    "o": np.zeros_like(x["do"]),
    "lse": np.full((B, N, T), -np.inf),
    **{"d" + n: np.zeros_like(x[n]) for n in ("q", "k", "v", "bias", "sinks")},
  }
  for b, n, i in np.ndindex(B, N, T):
    h = n // (N // K)
    keys = np.arange(S)
    if options.get("causal", True):
      keys = keys[keys <= i + offset]
    if "left" in options:
      keys = keys[keys >= i + offset - options["left"]]
    q, k, v = x["q"][b, i, n], x["k"][b, keys, h], x["v"][b, keys, h]
    t = scale * k @ q
    if options.get("bias"):
      t = t + x["bias"][0, n, i, keys]
    s = cap * np.tanh(t / cap) if cap else t
    sink = x["sinks"][n] if options.get("sinks") else -np.inf
    total = np.exp(s).sum() + np.exp(sink)
    if total == 0:
      continue
    p = np.exp(s) / total
    drop = x["dropout"][b, n, i, keys] if options.get("dropout") else 1.0
    out["o"][b, i, n] = (p * drop) @ v
    out["lse"][b, n, i] = np.log(total)

    do = x["do"][b, i, n]
    g = x["dlse"][b, n, i] if options.get("dlse") else 0.0
    dp = drop * (v @ do)
    mean = (p * dp).sum() - g
    ds = p * (dp - mean)
    dt = ds * (1 - (s / cap) ** 2) if cap else ds
    out["dq"][b, i, n] = scale * dt @ k
    out["dk"][b, keys, h] += scale * np.outer(dt, q)
    out["dv"][b, keys, h] += np.outer(p * drop, do)
    out["dbias"][0, n, i, keys] += dt
    out["dsinks"][n] -= np.exp(sink) / total * mean
  for name in ("bias", "sinks"):
    if not options.get(name):
      del out["d" + name]
  return out


def main():
  golden = {}
  for name, (dims, options) in CASES.items():
    out = attention(dims, options)
    empty = int(np.isneginf(out["lse"]).sum())
    out["lse"] = np.where(np.isneginf(out["lse"]), 0.0, out["lse"])
    golden[name] = {
      "dims": dims,
      "options": options,
      "empty_rows": empty,
      "values": {k: np.round(v, 13).ravel().tolist() for k, v in out.items()},
      "sums": {
        k: round(float((v if k == "lse" else np.abs(v)).sum()), 10)
        for k, v in out.items()
      },
    }
  path = pathlib.Path(__file__).with_name("attention.json")
  path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
  main()
