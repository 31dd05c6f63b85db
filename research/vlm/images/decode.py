"""Image files as RGB arrays, and their sizes from the headers alone.

One rule for each thing that a file may hold:

* EXIF's orientation is applied, so that sizes are those of the upright image.
* Transparency (RGBA, LA, a palette's, a transparent colour) is composited on a
  backdrop, white as transformers' `convert_to_rgb` does; Pillow's own
  `convert("RGB")` shows whatever colour is stored below it.
* Samples of 16 bits keep their high byte, as Pillow reads 16-bit colour, those
  of 12 bits their high eight. (Its `convert` saturates 16-bit grey: all above
  255 is white; and of a TIFF whose zero is white it makes a negative.)
* CMYK, YCbCr and HSV are converted by Pillow, without colour profiles.
* An animation is its first frame, or refused: `animation`.
* Floats, 32-bit integers and Lab have no agreed white, and are refused.

Files are hostile: the formats below alone are tried (Pillow starts Ghostscript
for PostScript), an image with more pixels than `max_pixels` is refused from its
header, and whatever Pillow raises is a UserError that names the file.
"""

import contextlib
import io
import os
import struct
from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from research.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Pillow's names of the formats that are read; MPO is a JPEG."""

VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")
"""Names' ends of videos, which are refused as such."""

MAX_PIXELS = 89_478_485
"""Pillow's own limit: 256 MiB of RGB. It refuses twice as many in any case."""

WHITE = (255, 255, 255)

Source = str | os.PathLike | bytes
"""A path of a local file, or the bytes of one."""

Animation = Literal["first", "refuse"]

_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation (1: it is)."""

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 0x0102, 0x0106, 0
"""Of TIFF."""

_CONVERTED = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
_ALPHA = ("RGBA", "LA", "PA", "RGBa")
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N")


def image_size(source: Source, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
  """Returns (height, width) of the upright image, from the header alone.

  Raises:
    UserError: it is no image that `open_image` reads, or one with too many
      pixels. A file that ends in the middle of its pixels is not noticed.
  """
  with _opened(source, max_pixels) as (image, file):
    width, height = image.size
    return (width, height) if _orientation(image, file) > 4 else (height, width)


def open_image(
  source: Source,
  max_pixels: int = MAX_PIXELS,
  *,
  backdrop: tuple[int, int, int] = WHITE,
  animation: Animation = "first",
) -> UInt8[np.ndarray, "H W 3"]:
  """Returns an image file's pixels.

  Args:
    source: a path of a local file, or the bytes of one.
    max_pixels: of the image; above, it is refused before it is decoded.
    backdrop: RGB that transparent pixels show.
    animation: what becomes of a file with several frames.

  Raises:
    UserError: the file is missing, empty, truncated, corrupt, too large, or of
      a kind that has no agreed conversion.
  """
  with _opened(source, max_pixels) as (image, file):
    # The further pictures of an MPO are previews, or the other eye's.
    if animation == "refuse" and image.format != "MPO":
      frames = getattr(image, "n_frames", 1)  # reads all of the file
      if frames > 1:
        raise UserError(
          f"{_name(source)}: an animation of {frames} frames, expected a still "
          'image; animation="first" takes the first frame'
        )
    orientation = _orientation(image, file)
    image.load()
    rgb = _to_rgb(image, backdrop, _name(source))
  if orientation in _TRANSPOSE:
    rgb = rgb.transpose(_TRANSPOSE[orientation])
  return np.array(rgb)


@contextlib.contextmanager
def _opened(
  source: Source, max_pixels: int
) -> Iterator[tuple[Image.Image, io.BufferedIOBase]]:
  """Yields the image, its header read, and its file.

  Whatever happens inside, too, is the file's fault.
  """
  name = _name(source)
  with _file(source, name) as file:
    try:
      with Image.open(file, formats=FORMATS) as image:
        _check_size(image.size, max_pixels, name)
        yield image, file
    except UserError:
      raise
    except Image.DecompressionBombError as e:
      raise UserError(
        f"{name}: more than {2 * MAX_PIXELS:,} pixels, which Pillow never "
        "decodes: scale the image down first"
      ) from e
    except Image.UnidentifiedImageError as e:
      if str(name).lower().endswith(VIDEOS):
        raise UserError(
          f"{name}: a video, which no model here reads; give some of its frames"
          " as images"
        ) from e
      file.seek(0)
      start = file.read(8)
      raise UserError(
        f"{name}: no image of a format that is read ({', '.join(FORMATS)}), or "
        f"cut off in its header; it starts with {start!r}. Fetch it again, or "
        "convert it to PNG"
      ) from e
    # A damaged file makes Pillow's readers raise almost anything.
    except Exception as e:
      raise UserError(
        f"{name}: a damaged image ({type(e).__name__}: {str(e)[:120]}): fetch "
        "or convert it again, or leave it out"
      ) from e


def _file(source: Source, name: str) -> io.BufferedIOBase:
  if isinstance(source, bytes):
    if not source:
      raise UserError("an empty file, expected an image")
    return io.BytesIO(source)
  path = os.fspath(source)
  if str(path).startswith(("http://", "https://", "data:")):
    raise UserError(f"{name[:80]}: expected a path: only local files are read")
  if not os.path.isfile(path):
    what = "a folder" if os.path.isdir(path) else "no such file"
    raise UserError(f"{name}: {what}, expected an image file")
  if not os.path.getsize(path):
    raise UserError(f"{name}: an empty file, expected an image")
  try:
    return open(path, "rb")
  except OSError as e:
    raise UserError(f"{name}: it cannot be read: {e.strerror}") from e


def _name(source: Source) -> str:
  if isinstance(source, bytes):
    return f"an image of {len(source):,} bytes"
  return os.fspath(source)


def _check_size(size: tuple[int, int], most: int, name: str) -> None:
  width, height = size
  if width < 1 or height < 1:
    raise UserError(
      f"{name}: an image of {width} x {height} pixels: leave it out"
    )
  if width * height > most:
    raise UserError(
      f"{name}: {width} x {height} = {width * height:,} pixels, expected at "
      f"most {most:,}: scale the image down, or raise max_pixels"
    )


def _orientation(image: Image.Image, file: io.BufferedIOBase) -> int:
  """Returns EXIF's orientation, from 1 to 8; 1 where there is none."""
  if image.format == "TIFF":
    return 1  # Pillow applies it when it reads the header
  try:
    late = image.format == "PNG" and "exif" not in image.info
    if late and (chunk := _late_png_exif(file)):
      image.info["exif"] = chunk
    # Not PNG's own, which decodes the pixels first.
    exif = Image.Image.getexif(image)
    found = exif.get(_EXIF_ORIENTATION)
  except Exception:  # of damaged metadata, about which pixels do not care
    return 1
  return found if found in range(1, 9) else 1


def _late_png_exif(file: io.BufferedIOBase) -> bytes | None:
  """Returns a PNG's eXIf chunk, which may stand behind its pixels.

  Pillow looks there only after it has decoded them.
  """
  position = file.tell()
  try:
    file.seek(8)
    while len(header := file.read(8)) == 8:
      length, kind = struct.unpack(">I4s", header)
      if kind == b"eXIf":
        return file.read(min(length, 1 << 16))
      file.seek(length + 4, os.SEEK_CUR)
    return None
  finally:
    file.seek(position)


def _to_rgb(
  image: Image.Image, backdrop: tuple[int, int, int], name: str
) -> Image.Image:
  if image.mode in _DEEP or (image.mode, image.format) == ("I", "PPM"):
    return _deep_to_rgb(image, backdrop)
  keyed = "transparency" in image.info and image.mode in _CONVERTED
  if keyed or image.mode in _ALPHA:
    below = Image.new("RGBA", image.size, (*backdrop, 255))
    above = image.convert("RGBA")
    return Image.alpha_composite(below, above).convert("RGB")
  if image.mode in _CONVERTED:
    return image.convert("RGB")
  raise UserError(
    f"{name}: pixels of mode {image.mode}, which have no agreed conversion to "
    "RGB: convert the file to 8 bits a channel"
  )


def _deep_to_rgb(
  image: Image.Image, backdrop: tuple[int, int, int]
) -> Image.Image:
  """Converts deep grey; its transparent value, if any, is `backdrop`."""
  grey = np.asarray(image).astype(np.int64)
  tags = getattr(image, "tag_v2", {})
  [bits] = tags.get(_BITS_PER_SAMPLE, (16,))
  high = (np.clip(grey, 0, 65535) >> (bits - 8)).astype(np.uint8)
  if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
    high = 255 - high
  rgb = np.repeat(high[..., None], 3, axis=-1)
  key = image.info.get("transparency")
  if isinstance(key, int):
    rgb[grey == key] = backdrop
  return Image.fromarray(rgb)
