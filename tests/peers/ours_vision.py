"""Heptad's side of the comparisons of vision language models; see ours.py.

vision    pixels [V, 3, H, W], tokens [B, T], counts [B] (views of each row),
          answer [B] (first token not in the prefix; -1 if all is prompt)
          -> soft tokens and logits; the model is written to --adapter
adapted   as vision -> logits under a new adapter of the language model, which
          is left at --adapter in PEFT's format
native    image_<i> [H, W, 3], counts [B] (images of each row), tokens [B, T],
          lengths [B], steps (views: most of a row)
          -> soft tokens and logits of images of native resolution, or as the
          directory's preprocessor has them, and steps tokens generated through
          the cache; the model is written to --adapter
dual      image_<i> [H, W, 3], tokens [C, T]
          -> vectors of images, as the directory's preprocessor has them, and of
          texts, and their products; the model is written to --adapter
"""

import shutil
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.masks import Mask
from research import tree
from research.generation import generate
from research.interop import peft, vision
from research.interop.peft import names as peft_names
from research.interop.vision import adapters
from research.lora import adapt
from research.lora.methods.lora import LoRA
from research.nn import logits
from research.vlm import data, splice, within
from research.vlm.encoders import native as native_patches
from research.vlm.encoders import vit
from research.vlm.images.preprocessor import Preprocessor
from research.vlm.images.tiling.native import Native


def adapted(it, args, rows) -> dict:
  """Returns what `vision_language` does, under an adapter, which it writes."""
  put = within.Within("language", adapt.Adapt(method=LoRA(rank=3, alpha=5.0)))

  def move(path, x):
    own = path.startswith("language/") and path.endswith("/trained/b")
    key = jax.random.key(zlib.crc32(path.encode()))
    return 0.2 * jax.random.normal(key, x.shape) if own else x

  params = tree.map_paths(move, put(it.params, jax.random.key(0)))
  model, own = adapters.language_model(it.model, params)
  naming = peft_names.naming_of_source(it.source)
  peft.save_adapter(args.adapter, own, model, args.model, naming=naming)
  return _forward(it.model, params, rows)


def vision_language(it, args, rows) -> dict:
  """Returns soft tokens of normalised views, and the logits of rows."""
  if args.adapter:
    shutil.rmtree(args.adapter, ignore_errors=True)
    vision.write_model(args.adapter, it, it.params)
  return _forward(it.model, it.params, rows)


def _forward(model, params, rows) -> dict:
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
  # Those of the connector; the model may scale what it splices.
  plain = np.asarray(soft) / model.scale
  return dict(features=plain, logits=np.asarray(found))


def native(it, args, rows) -> dict:
  """Returns soft tokens, logits and greedy tokens of rows with images."""
  model, params = it.model, it.params
  tiling = Native(patch=model.vision.patch, merge=model.square, min_pixels=1)
  how = it.preprocessor or Preprocessor(tiling, model.normalise)
  most = int(rows.get("views", rows["counts"].max()))
  ends = np.cumsum(rows["counts"])
  prompts = [
    data.Prompt.from_images(
      [rows[f"image_{i}"] for i in range(end - count, end)], how, most
    )
    for end, count in zip(ends, rows["counts"], strict=True)
  ]
  language = model.with_images_compiled(
    params, data.batch_images(prompts, model.square)
  )
  # Those of the connector; the model may scale what it splices.
  soft = language["embed"].features / model.scale
  if "injected" in language:
    deeper = language["injected"].features
    soft = jnp.concatenate([soft[:, :, None], deeper], axis=2)
  used = [x[: made.soft_tokens] for x, made in zip(soft, prompts, strict=True)]
  tokens = jnp.asarray(rows["tokens"])
  mask = model.mask(tokens, jnp.asarray(rows["lengths"]))
  found = logits(model.language, language, tokens, None, mask)
  ids = [
    row[:n].tolist()
    for row, n in zip(rows["tokens"], rows["lengths"], strict=True)
  ]
  source = model.token_source()
  new = generate.generate(
    model.language, language, ids, int(rows["steps"]), source=source
  )
  shutil.rmtree(args.adapter, ignore_errors=True)
  vision.write_model(args.adapter, it, params)
  return dict(
    features=np.concatenate(used),
    logits=np.asarray(found),
    generated=np.asarray(new.tokens),
  )


def dual(it, args, rows) -> dict:
  """Returns the vectors of images and of texts."""
  model, params, how = it.model, it.params, it.preprocessor
  names = sorted(k for k in rows if k.startswith("image_"))
  made = [data.Prompt.from_images([rows[k]], how, 1) for k in names]
  images = native_patches.encoder_inputs(
    data.batch_images(made), how.normalise, model.image
  )
  tokens = jnp.asarray(rows["tokens"])
  found, texts, scale, bias = model.apply({"params": params}, *images, tokens)
  shutil.rmtree(args.adapter, ignore_errors=True)
  vision.write_model(args.adapter, it, params)
  products = scale * found @ texts.T + bias
  return dict(
    image_embeds=np.asarray(found),
    text_embeds=np.asarray(texts),
    logits_per_image=np.asarray(products),
  )


COMMANDS = dict(
  vision=vision_language, adapted=adapted, native=native, dual=dual
)
