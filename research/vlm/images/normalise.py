"""Pixels as floats: the constants that encoders were trained with."""

import dataclasses

import numpy as np
from jaxtyping import Float32, UInt8

_BLOCK = 1 << 16
"""Values that stay in a core's cache between the steps."""


@dataclasses.dataclass(frozen=True)
class Normalisation:
  """`(pixel / 255 - mean) / std`, channel by channel, in float32.

  Attributes:
    mean: of red, green and blue, in [0, 1].
    std: of each of them.
  """

  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def __call__(
    self, pixels: UInt8[np.ndarray, "*shape 3"]
  ) -> Float32[np.ndarray, "*shape 3"]:
    """Returns what transformers' PIL backend does, to the last bit.

    That one multiplies by 1/255 in float64 first: the quotient in float32 is
    the same for each of the 256 values.
    """
    mean, std = np.float32(self.mean), np.float32(self.std)
    flat = np.ascontiguousarray(pixels).reshape(-1)
    out = np.empty(flat.shape, np.float32)
    step = min(_BLOCK // 3 * 3, max(3, flat.size))
    means, stds = np.tile(mean, step // 3), np.tile(std, step // 3)
    for start in range(0, flat.size, step):
      block = out[start : start + step]
      np.divide(flat[start : start + step], np.float32(255), out=block)
      block -= means[: block.size]
      block /= stds[: block.size]
    return out.reshape(pixels.shape)


CLIP = Normalisation(
  mean=(0.48145466, 0.4578275, 0.40821073),
  std=(0.26862954, 0.26130258, 0.27577711),
)
"""CLIP, LLaVA, Molmo, Qwen2-VL, Qwen2.5-VL, BLIP-2."""

HALF = Normalisation(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""To [-1, 1]: SigLIP, PaliGemma, Idefics3, SmolVLM, Gemma 3, Qwen3-VL."""

IMAGENET = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""InternVL."""

UNIT = Normalisation(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""To [0, 1]: Gemma 4, which scales inside of the model, and nanoVLM."""
