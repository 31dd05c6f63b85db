"""What denoisers are compared with: one pass over whole rows, no cache."""

from research.diffusion import denoiser


def logits(model, params, tokens, valid, block, time=None):
  """Returns logits of every place, by a mask as an array."""
  hidden, _ = model.apply(
    {"params": params},
    tokens,
    denoiser.positions(valid),
    denoiser.visible(block, valid),
    time=time,
  )
  return model.apply({"params": params}, hidden, method="logits")
