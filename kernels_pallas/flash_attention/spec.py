"""What every backend of flash attention is asked: static values and arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from kernels_pallas.flash_attention import dropout
from kernels_pallas.masks import Mask


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Tile sizes of the blockwise backend; `tile_sizes.fitted` chooses them.

  Attributes:
    q: Queries a tile.
    k: Keys a tile, where the loop over tiles is a loop of the program.
    unroll: A block of q queries meets all its keys at once, and the blocks
      are unrolled, while T, and the keys of one query block, are at most this
      many tokens: fastest on CPU, and differentiable twice. Beyond it memory
      is what matters: loops over tiles of q times k.
  """

  q: int = 128
  k: int = 512
  unroll: int = 4096

  def __post_init__(self):
    if self.q < 1 or self.k < 1:
      raise ValueError(
        f"blocks: found q={self.q}, k={self.k}, expected at least 1"
      )


@dataclasses.dataclass(frozen=True)
class Spec:
  """The static part of an attention call.

  Attributes:
    scale: Factor on q.k.
    softcap: c of c tanh(t / c), or None.
    bias_before_softcap: Whether the bias is inside the soft cap.
    dropout_rate: Share of the normalised probabilities that is dropped.
    keep: `(seed, rate, b, h, i, j) -> Bool`, as `dropout.keep`.
    precision: Of all matmuls, as in `jax.lax.dot`.
    blocks: Tile sizes, a type of the backend's own.
    output: Type of the output; None is that of q.
  """

  scale: float
  softcap: float | None = None
  bias_before_softcap: bool = False
  dropout_rate: float = 0.0
  keep: Callable[..., jax.Array] = dropout.keep
  precision: Any = None
  blocks: Any = Blocks()
  output: Any = None


class Operands(NamedTuple):
  """The arrays of an attention call.

  Fields: q [B, T, N, H], k [B, S, K, H], v [B, S, K, Hv], mask, bias
  broadcastable to [B, N, T, S] (four axes) or None, sinks [N] or None, seed
  [] or None.
  """

  q: Any
  k: Any
  v: Any
  mask: Mask
  bias: Any = None
  sinks: Any = None
  seed: Any = None


class Backend(NamedTuple):
  """An implementation.

  Fields: attend `(spec, x) -> (o, lse)`; gradients `(spec, x, queries) ->
  Operands` of q, k, v and bias in the accumulator dtype, where `queries` (of
  `cotangents`) may be those of more keys than x has, or None where JAX
  differentiates `attend`; config, the type of `spec.blocks`.
  """

  attend: Callable[[Spec, Operands], tuple[jax.Array, jax.Array]]
  gradients: Callable[[Spec, Operands, Any], Operands] | None
  config: type
