"""Heptad's side of the comparisons of vision language models; see ours.py.

vision    pixels [V, 3, H, W], tokens [B, T], counts [B] (views of each row),
          answer [B] (first token not in the prefix; -1 if all is prompt)
          -> soft tokens and logits; the model is written to --adapter
"""

import shutil

import jax.numpy as jnp
import numpy as np

from kernels_pallas.masks import Mask
from research.interop import vision
from research.nn import logits
from research.vlm import splice
from research.vlm.encoders import vit


def vision_language(it, args, rows) -> dict:
  """Returns soft tokens of normalised views, and the logits of rows."""
  model, params = it.model, it.params
  patches = vit.patchify(
    jnp.asarray(rows["pixels"]).transpose(0, 2, 3, 1), model.vision.patch
  )
  grid = tuple(n // model.vision.patch for n in rows["pixels"].shape[2:])
  at = vit.grid_coordinates(*grid)
  at = jnp.broadcast_to(at, (*patches.shape[:2], 2))
  soft = model.connect(params, model.encode_patches(params, patches, at), grid)
  ends = np.cumsum(rows["counts"])
  most = int(rows["counts"].max()) * soft.shape[1]
  of_rows = []
  for start, end in zip(ends - rows["counts"], ends, strict=True):
    own = soft[start:end].reshape(-1, soft.shape[2])
    of_rows.append(jnp.pad(own, ((0, most - len(own)), (0, 0))))
  language = splice.with_features(
    params["language"], jnp.stack(of_rows), model.image_token
  )
  tokens = jnp.asarray(rows["tokens"])
  mask = model.mask(tokens, jnp.full(len(tokens), tokens.shape[1]))
  if rows["answer"].min() >= 0:
    mask = Mask.prefix_lm(jnp.asarray(rows["answer"]))
  found = logits(model.language, language, tokens, None, mask)
  if args.adapter:
    shutil.rmtree(args.adapter, ignore_errors=True)
    vision.write_model(args.adapter, it, params)
  # Those of the connector; the model may scale what it splices.
  plain = np.asarray(soft) / model.scale
  return dict(features=plain, logits=np.asarray(found))


COMMANDS = dict(vision=vision_language)
