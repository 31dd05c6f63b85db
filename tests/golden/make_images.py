"""Writes images.json and image_counts.npz: what published processors do.

  .venv-peers/bin/python tests/golden/make_images.py

The processors are transformers' (its PIL backend; Molmo 2 has torchvision's
only), the pictures made of integers by `picture`. images.json has hashes of
pixels, of float32 `[N, H, W, 3]` or `[patches, y, x, 3]`; of Molmo 2, uint8, as
torchvision normalises in other steps. image_counts.npz has the numbers that
processors come to for 2,000 sizes: where a processor has no function for
that, it runs on images of shape alone.
"""

import contextlib
import hashlib
import importlib
import json
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).parent
HASHES, COUNTS = HERE / "images.json", HERE / "image_counts.npz"
SIZES = 2000

OBLONG = [(48, 64), (64, 40), (3, 7), (1, 1), (90, 5), (5, 90), (37, 41)]
"""Of pictures, (height, width)."""

CLIP = {
  "image_mean": [0.48145466, 0.4578275, 0.40821073],
  "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGENET = {
  "image_mean": [0.485, 0.456, 0.406],
  "image_std": [0.229, 0.224, 0.225],
}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]


def _config(name, **values):
  return {"image_processor_type": f"{name}ImageProcessor", **values}


CASES = {  # name -> (configuration, patch, pool, sizes)
  "clip": (
    _config("CLIP", size={"shortest_edge": 35}, crop_size=32), 4, 1, OBLONG,
  ),
  "siglip": (
    _config("Siglip", size={"height": 32, "width": 32}), 4, 1, OBLONG,
  ),
  "llava_pad": (
    _config("Llava", size={"shortest_edge": 32}, crop_size=32, do_pad=True),
    4, 1, OBLONG,
  ),
  "llava_next": (
    _config("LlavaNext", size={"shortest_edge": 32}, crop_size=32,
            image_grid_pinpoints=PINPOINTS), 4, 1, OBLONG,
  ),
  "llava_next_full": (
    _config("LlavaNext", size={"shortest_edge": 336}, crop_size=336), 14, 1,
    [(48, 64)],
  ),
  "idefics3": (
    _config("Idefics3", size={"longest_edge": 96},
            max_image_size={"longest_edge": 32}), 4, 2, OBLONG,
  ),
  "idefics3_unsplit": (
    _config("Idefics3", size={"longest_edge": 96}, do_image_splitting=False,
            max_image_size={"longest_edge": 32}), 4, 2, OBLONG,
  ),
  "smolvlm_full": (
    _config("SmolVLM", size={"longest_edge": 2048},
            max_image_size={"longest_edge": 512}), 16, 4, [(30, 44)],
  ),
  "internvl": (
    _config("GotOcr2", size={"height": 32, "width": 32}, max_patches=6,
            crop_to_patches=True, **IMAGENET), 4, 2, OBLONG,
  ),
  "internvl_full": (
    _config("GotOcr2", size={"height": 448, "width": 448},
            crop_to_patches=True, **IMAGENET), 14, 2, [(30, 44)],
  ),
  "qwen2_vl": (
    _config("Qwen2VL", size={"shortest_edge": 784, "longest_edge": 9000},
            patch_size=7), None, None, OBLONG,
  ),
  "qwen3_vl": (
    _config("Qwen2VL", size={"shortest_edge": 65536,
                             "longest_edge": 16777216},
            patch_size=16, **HALF), None, None, [(48, 64), (300, 200)],
  ),
  "naflex": (
    _config("Siglip2", max_num_patches=64, patch_size=8), None, None, OBLONG,
  ),
  "gemma3": (
    _config("Gemma3", size={"height": 32, "width": 32}), 4, 2, OBLONG,
  ),
  "gemma3_pan_and_scan": (
    _config("Gemma3", size={"height": 32, "width": 32}, do_pan_and_scan=True,
            pan_and_scan_min_crop_size=8, pan_and_scan_max_num_crops=4,
            pan_and_scan_min_ratio_to_activate=1.2), 4, 2, OBLONG,
  ),
  "gemma4": (
    _config("Gemma4", max_soft_tokens=70), None, None, OBLONG,
  ),
  # No smaller: torch has another order of sums up to 128 rows and columns.
  "molmo2": (
    _config("Molmo2", size={"height": 84, "width": 84}, max_crops=6,
            overlap_margins=[1, 1]), None, None, OBLONG,
  ),
  "molmo2_full": (_config("Molmo2"), None, None, [(300, 500)]),
}  # fmt: skip


def picture(height, width):
  """Returns smooth red, ringing green and noisy blue, uint8 [H, W, 3]."""
  y, x = np.mgrid[:height, :width].astype(np.int64)
  red = (x * 255 // max(width - 1, 1) + y * 3) // 2 % 256
  green = (x * x * 3 + y * y * 5 + x * y) // 7 % 256
  blue = ((x * 1103515245 + y * 12345 + x * y * 69069 + 7) >> 12) % 256
  return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def digest(pixels):
  return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def processor(config):
  """Returns transformers' processor of a configuration."""
  import transformers

  name = config["image_processor_type"]
  values = {k: v for k, v in config.items() if k != "image_processor_type"}
  if name == "Molmo2ImageProcessor":
    return transformers.Molmo2ImageProcessor(**values)
  folder = {
    "CLIP": "clip", "Siglip": "siglip", "Llava": "llava",
    "LlavaNext": "llava_next", "Idefics3": "idefics3", "SmolVLM": "smolvlm",
    "GotOcr2": "got_ocr2", "Qwen2VL": "qwen2_vl", "Siglip2": "siglip2",
    "Gemma3": "gemma3", "Gemma4": "gemma4",
  }[name.removesuffix("ImageProcessor")]  # fmt: skip
  module = importlib.import_module(
    f"transformers.models.{folder}.image_processing_pil_{folder}"
  )
  return getattr(module, f"{name}Pil")(**values)


@contextlib.contextmanager
def _two_threads():
  """Runs torch on two threads: on one, it sums a bilinear pixel otherwise."""
  import torch

  before = torch.get_num_threads()
  torch.set_num_threads(2)
  yield
  torch.set_num_threads(before)


def pixels_of(config, image, made=None):
  """Returns a processor's pixels of an array or a picture of Pillow's.

  They are floats, or uint8 of Molmo 2.
  Views are `[N, H, W, 3]`; of kinds that make patches, `[P, y, x, 3]`.
  """
  import PIL.Image

  name = config["image_processor_type"].removesuffix("ImageProcessor")
  made = made or processor(config)
  drawn = isinstance(image, np.ndarray)
  picture = PIL.Image.fromarray(image) if drawn else image
  tensors = "pt" if made.backend == "torchvision" else "np"
  with _two_threads():
    out = made(picture, return_tensors=tensors)
  values = np.asarray(out["pixel_values"])
  side = getattr(made, "patch_size", None)
  if name == "Qwen2VL":
    return values.reshape(-1, 3, 2, side, side)[:, :, 0].transpose(0, 2, 3, 1)
  if name == "Siglip2":
    count = int(np.asarray(out["spatial_shapes"])[0].prod())
    return values[0, :count].reshape(-1, side, side, 3)
  if name == "Gemma4":
    count = int((np.asarray(out["image_position_ids"])[0, :, 0] >= 0).sum())
    return values[0, :count].reshape(-1, side, side, 3)
  if name == "Molmo2":
    levels = (values * made.image_std[0] + made.image_mean[0]) * 255
    grid = made.size["height"] // side
    cut = levels.reshape(-1, grid, grid, side, side, 3).swapaxes(2, 3)
    return (
      np.round(cut).astype(np.uint8).reshape(-1, grid * side, grid * side, 3)
    )
  values = values[0] if values.ndim == 5 else values
  return np.moveaxis(values, 1, -1)


def hashes():
  found = {}
  for name, (config, _, _, sizes) in CASES.items():
    for height, width in sizes:
      pixels = pixels_of(config, picture(height, width))
      found[f"{name} {height}x{width}"] = [list(pixels.shape), digest(pixels)]
  return found


def _of_shape(height, width):
  """Returns an image without memory, [3, H, W]."""
  return np.broadcast_to(np.uint8(0), (3, height, width))


def counts():
  """Returns presets' names -> numbers for each size; and the sizes."""
  import transformers.image_processing_backends as backends
  from transformers.image_processing_utils import select_best_resolution
  from transformers.models.gemma4 import image_processing_pil_gemma4 as gemma4
  from transformers.models.llava_next import processing_llava_next as next_
  from transformers.models.siglip2 import image_processing_pil_siglip2 as flex

  backends.np_resize = lambda image, size, **_: _of_shape(*size)
  exponents = np.random.default_rng(0).uniform(3, 12, (SIZES, 2))
  sizes = np.round(2**exponents).astype(np.int32)

  def idefics3(longest, tile):
    edges = {"size": longest, "max_image_size": tile}
    edges = {key: {"longest_edge": side} for key, side in edges.items()}
    made = processor(_config("Idefics3", **edges))

    def one(height, width):
      image = made.resize(_of_shape(height, width), made.size)
      image = made.resize_for_vision_encoder(image, tile)
      views, rows, columns = made.split_images(image, made.max_image_size)
      return rows, columns, len(views)

    return one

  def llava_next(height, width):
    pinpoints = processor(_config("LlavaNext")).image_grid_pinpoints
    maker = next_.LlavaNextProcessor.__new__(next_.LlavaNextProcessor)
    maker.image_processor = processor(_config("LlavaNext"))
    maker.patch_size, maker.num_additional_image_tokens = 14, 1
    best = select_best_resolution((height, width), pinpoints)
    tokens = maker._get_number_of_features(height, width, 336, 336) - 1
    return best[0] // 336, best[1] // 336, tokens

  def internvl(height, width):
    made = processor(CASES["internvl_full"][0])
    return (made.get_number_of_image_patches(height, width),)

  def qwen(config):
    made = processor(config)

    def one(height, width):
      if max(height, width) > 200 * min(height, width):
        return -1, -1
      step = made.patch_size * made.merge_size
      image = made.resize(
        _of_shape(height, width), made.size, made.resample, factor=step
      )
      return tuple(side // made.patch_size for side in image.shape[1:])

    return one

  def naflex(height, width):
    found = flex.get_image_size_for_max_num_patches(height, width, 16, 256)
    return tuple(side // 16 for side in found)

  def gemma4_(height, width):
    found = gemma4.get_aspect_ratio_preserving_size(
      height, width, patch_size=16, max_patches=280 * 9, pooling_kernel_size=3
    )
    return tuple(side // 16 for side in found)

  def gemma3(height, width):
    made = processor(_config("Gemma3"))
    crops = made.pan_and_scan(_of_shape(height, width), 256, 4, 1.2)
    return (len(crops),)

  def molmo2(height, width):
    made = processor(_config("Molmo2"))
    grid, crops = made.get_image_grid_and_crops(height, width)
    return (*grid, crops)

  kinds = {
    "smolvlm-256m": idefics3(2048, 512),
    "smolvlm-2.2b": idefics3(1536, 384),
    "idefics3": idefics3(1456, 364),
    "llava-next": llava_next,
    "internvl": internvl,
    "qwen2-vl": qwen(
      _config("Qwen2VL", min_pixels=3136, max_pixels=12_845_056)
    ),
    "qwen3-vl": qwen(CASES["qwen3_vl"][0]),
    "siglip2-naflex": naflex,
    "gemma4": gemma4_,
    "gemma3-pan-and-scan": gemma3,
    "molmo2": molmo2,
  }
  found = {
    name: np.array([one(*size) for size in sizes.tolist()], np.int32)
    for name, one in kinds.items()
  }
  return found | {"sizes": sizes}


def main():
  HASHES.write_text(json.dumps(hashes(), indent=1) + "\n")
  np.savez_compressed(COUNTS, **counts())


if __name__ == "__main__":
  main()
