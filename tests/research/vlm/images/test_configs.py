"""Published `preprocessor_config.json` files make the presets' values."""

import dataclasses
import json
import subprocess
import sys

import pytest

from research.errors import UserError
from research.vlm.images.configs import from_preprocessor_config
from research.vlm.images.normalise import CLIP, HALF, UNIT
from research.vlm.images.presets import preset
from research.vlm.images.tiling import Budget, Native, Square

ON = {
  "do_resize": True,
  "do_rescale": True,
  "do_normalize": True,
  "do_convert_rgb": True,
  "rescale_factor": 0.00392156862745098,
}
CLIP_STATS = {
  "image_mean": [0.48145466, 0.4578275, 0.40821073],
  "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF_STATS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGENET_STATS = {
  "image_mean": [0.485, 0.456, 0.406],
  "image_std": [0.229, 0.224, 0.225],
}
# As `save_pretrained` of the torchvision classes writes them.
NULLS = dict.fromkeys(
  ["data_format", "device", "input_data_format", "return_tensors", "pad_size"]
)
SMOLVLM = {
  **ON, **HALF_STATS, "do_image_splitting": True, "do_pad": True,
  "image_processor_type": "Idefics3ImageProcessor", "resample": 1,
  "processor_class": "Idefics3Processor", "size": {"longest_edge": 2048},
  "max_image_size": {"longest_edge": 512},
}  # fmt: skip
GEMMA4 = {
  "do_convert_rgb": True, "do_normalize": False, "do_rescale": True,
  "do_resize": True, "image_mean": [0.0] * 3, "image_std": [1.0] * 3,
  "image_processor_type": "Gemma4ImageProcessor", "image_seq_length": 280,
  "max_soft_tokens": 280, "patch_size": 16, "pooling_kernel_size": 3,
  "resample": 3, "rescale_factor": 0.00392156862745098,
}  # fmt: skip

FILES = {  # preset -> (file, patch, pool)
  "llava-1.5-stage1": (
    ON | CLIP_STATS | {
      "crop_size": {"height": 336, "width": 336}, "do_center_crop": True,
      "image_processor_type": "CLIPImageProcessor", "resample": 3,
      "processor_class": "LlavaProcessor", "size": {"shortest_edge": 336},
    }, 14, 1,
  ),
  "clip-vit-l-336": (  # CLIP's own first files have whole numbers
    ON | CLIP_STATS | {
      "crop_size": 336, "do_center_crop": True, "size": 336, "resample": 3,
      "feature_extractor_type": "CLIPFeatureExtractor",
      "image_processor_type": "CLIPImageProcessor",
    }, 14, 1,
  ),
  "llava-1.5": (
    ON | CLIP_STATS | {
      "crop_size": {"height": 336, "width": 336}, "do_pad": True,
      "image_processor_type": "LlavaImageProcessorFast", "resample": 3,
      "size": {"shortest_edge": 336},
    }, 14, 1,
  ),
  "llava-next": (
    ON | CLIP_STATS | {
      "aspect_ratio_setting": "anyres", "do_center_crop": True,
      "crop_size": {"height": 336, "width": 336}, "do_pad": True,
      "image_grid_pinpoints": [
        [336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]
      ],
      "image_processor_type": "LlavaNextImageProcessor", "resample": 3,
      "processor_class": "LlavaNextProcessor", "size": {"shortest_edge": 336},
    }, 14, 1,
  ),
  "smolvlm-256m": (SMOLVLM, 16, 4),
  "idefics3": ({"image_processor_type": "Idefics3ImageProcessor"}, 14, 2),
  "paligemma-448": (
    ON | HALF_STATS | {
      "do_convert_rgb": None, "image_seq_length": 1024, "resample": 3,
      "image_processor_type": "SiglipImageProcessor",
      "processor_class": "PaliGemmaProcessor",
      "size": {"height": 448, "width": 448},
    }, 14, 1,
  ),
  "siglip2-naflex": (
    NULLS | ON | HALF_STATS | {
      "image_processor_type": "Siglip2ImageProcessorFast", "patch_size": 16,
      "max_num_patches": 256, "resample": 2, "default_to_square": True,
    }, None, None,
  ),
  "internvl": (
    ON | IMAGENET_STATS | {
      "crop_to_patches": False, "image_processor_type":
      "GotOcr2ImageProcessorFast", "max_patches": 12, "min_patches": 1,
      "processor_class": "InternVLProcessor", "resample": 3,
      "size": {"height": 448, "width": 448},
    }, 14, 2,
  ),
  "qwen2.5-vl": (
    CLIP_STATS | {
      "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14,
      "temporal_patch_size": 2, "merge_size": 2,
      "image_processor_type": "Qwen2VLImageProcessor",
      "processor_class": "Qwen2_5_VLProcessor",
    }, None, None,
  ),
  "qwen3-vl": (
    HALF_STATS | {
      "size": {"longest_edge": 16777216, "shortest_edge": 65536},
      "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
      "processor_class": "Qwen3VLProcessor",
      "image_processor_type": "Qwen2VLImageProcessorFast",
    }, None, None,
  ),
  "gemma3": (
    NULLS | ON | HALF_STATS | {
      "crop_size": None, "do_center_crop": None, "do_pan_and_scan": None,
      "image_processor_type": "Gemma3ImageProcessorFast", "resample": 2,
      "image_seq_length": 256, "pan_and_scan_max_num_crops": None,
      "size": {"height": 896, "width": 896},
    }, 14, 4,
  ),
  "gemma3-pan-and-scan": (
    {
      "do_pan_and_scan": True, "size": {"height": 896, "width": 896},
      "image_processor_type": "Gemma3ImageProcessor",
    }, 14, 4,
  ),
  "gemma4": (
    {"processor_class": "Gemma4Processor", "image_processor": GEMMA4,
     "image_seq_length": 280}, None, None,
  ),
  "molmo2": (
    {"image_processor_type": "Molmo2ImageProcessor",
     "processor_class": "Molmo2Processor"}, None, None,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_published_files_are_the_presets(name, tmp_path):
  values, patch, pool = FILES[name]
  path = tmp_path / "preprocessor_config.json"
  path.write_text(json.dumps(values))
  for source in (values, path):
    found = from_preprocessor_config(source, patch=patch, pool=pool)
    assert found == preset(name)


def test_defaults_are_the_class_s():
  found = from_preprocessor_config(
    {"image_processor_type": "Qwen2VLImageProcessor"}
  )
  assert (found.tiling, found.normalise) == (Native(), CLIP)
  found = from_preprocessor_config(
    {"image_processor_type": "SiglipImageProcessor"}, patch=16, pool=1
  )
  assert found.tiling == Square(224, patch=16)
  assert found.normalise == HALF


def test_settings_that_change_pixels_are_read():
  whole = SMOLVLM | {"do_image_splitting": False}
  found = from_preprocessor_config(whole, patch=16, pool=4)
  assert found.tiling == dataclasses.replace(
    preset("smolvlm-256m").tiling, splitting="none"
  )
  raw = SMOLVLM | {"do_normalize": False}
  assert from_preprocessor_config(raw, patch=16, pool=4).normalise == UNIT
  # A size that some converted files have, and the class does not read.
  sized = GEMMA4 | {"size": {"height": 224, "width": 224}}
  assert from_preprocessor_config(sized).tiling == Budget()
  off = SMOLVLM | {"do_center_crop": False, "crop_size": None}
  assert from_preprocessor_config(off, patch=16, pool=4)


@pytest.mark.parametrize(
  "change, words",
  [
    ({"do_dance": True, "size_divisor": 32}, "do_dance, size_divisor: not"),
    ({"do_center_crop": True}, "do_center_crop: not known of Idefics3"),
    ({"image_processor_type": "ViTImageProcessor"}, "expected one of CLIP"),
    ({"image_processor_type": None}, "image_processor_type is None"),
    ({"resample": 0}, "resample is 0, expected one of 1 .lanczos."),
    ({"resample": "bicubic"}, "resample is 'bicubic'"),
    ({"do_resize": False}, "do_resize is False, expected true"),
    ({"do_rescale": False}, "do_rescale is False, expected true"),
    ({"rescale_factor": 1.0}, "rescale_factor is 1.0, expected 1/255"),
    ({"image_mean": [0.5, 0.5]}, "image_mean is .*three numbers"),
    ({"image_std": [0.5, 0.5, "a"]}, "image_std is .*three numbers"),
    ({"image_std": [0.5, 0.5, 0]}, "image_std is .*above 0"),
    ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean is .*three numbers"),
    ({"size": {"longest_edge": 0}}, "size is .*longest_edge"),
    ({"max_image_size": 10**9}, "max_image_size is 1000000000"),
    ({"do_image_splitting": "yes"}, "do_image_splitting is 'yes'"),
  ],
)
def test_what_would_not_be_done_is_refused_by_name(change, words):
  with pytest.raises(UserError, match=words):
    from_preprocessor_config(SMOLVLM | change, patch=16, pool=4)


@pytest.mark.parametrize(
  "values, words",
  [
    (FILES["llava-next"][0] | {"image_grid_pinpoints": [[336]]}, "pairs of"),
    (FILES["llava-next"][0] | {"aspect_ratio_setting": "pad"}, "not supported"),
    (FILES["llava-next"][0] | {"crop_size": 224}, "crop_size is 224"),
    (FILES["paligemma-448"][0] | {"size": {"height": 4, "width": 8}}, "square"),
    (FILES["paligemma-448"][0] | {"size": {"shortest_edge": 4}}, "height and"),
    (GEMMA4 | {"max_soft_tokens": 100}, "one of 70, 140"),
    (FILES["qwen3-vl"][0] | {"size": {"longest_edge": 9}}, "numbers of pixels"),
    ({"image_processor_type": "Molmo2ImageProcessor", "pooling_size": [1, 2]},
     "two equal numbers"),
  ],
)  # fmt: skip
def test_values_that_a_class_does_not_take(values, words):
  with pytest.raises(UserError, match=words):
    from_preprocessor_config(values, patch=14, pool=1)


def test_the_encoder_s_part_is_asked_for():
  with pytest.raises(UserError, match="pass patch= and pool="):
    from_preprocessor_config(SMOLVLM)


def test_files_that_are_no_configuration(tmp_path):
  path = tmp_path / "preprocessor_config.json"
  with pytest.raises(UserError, match="cannot be read"):
    from_preprocessor_config(path)
  path.write_text("{")
  with pytest.raises(UserError, match="not JSON"):
    from_preprocessor_config(path)
  path.write_text("[]")
  with pytest.raises(UserError, match="expected an object"):
    from_preprocessor_config(path)


def test_workers_import_no_jax():
  code = (
    "import sys\n"
    "from research.vlm import images\n"
    "for name in images.__all__: getattr(images, name)\n"
    "from research.vlm.images import tiling\n"
    "for name in tiling.__all__: getattr(tiling, name)\n"
    "print(sorted({'jax', 'flax', 'scipy', 'matplotlib'} & set(sys.modules)))"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True,
                        text=True)  # fmt: skip
  assert done.stdout.strip() == "[]", done.stdout + done.stderr
