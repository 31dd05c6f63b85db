"""Files of every kind become RGB by a stated rule, or are refused by name.

What is right comes from how the files are made, from EXIF's own table, from
Pillow's readers of colour, and from the arithmetic of compositing.
"""

import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from research.errors import UserError
from research.vlm.images.decode import FORMATS, image_size, open_image
from tests.fuzz import mutations

# Pillow's, about sizes between its two limits and about damaged metadata.
pytestmark = pytest.mark.filterwarnings(
  "ignore::PIL.Image.DecompressionBombWarning", "ignore::UserWarning"
)
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
LOSSLESS = ("PNG", "TIFF", "WEBP", "BMP", "PPM")


def file_of(image, form, **options) -> bytes:
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  if form == "WEBP":
    options.setdefault("lossless", True)
  file = io.BytesIO()
  image.save(file, form, **options)
  return file.getvalue()


def png(width, height, depth, colour, rows, before=(), after=()) -> bytes:
  """Returns a PNG with these chunks before and after the pixels."""
  header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
  pixels = (b"IDAT", zlib.compress(rows))
  chunks = [(b"IHDR", header), *before, pixels, *after, (b"IEND", b"")]
  out = b"\x89PNG\r\n\x1a\n"
  for name, data in chunks:
    crc = zlib.crc32(name + data)
    out += struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)
  return out


@pytest.mark.parametrize("form", LOSSLESS)
def test_rgb_is_what_was_saved_whatever_holds_it(form, tmp_path):
  data = file_of(RGB, form)
  path = tmp_path / "file"  # its name says nothing
  path.write_bytes(data)
  for source in (data, path, str(path)):
    found = open_image(source)
    assert found.dtype == np.uint8 and found.flags.writeable
    np.testing.assert_array_equal(found, RGB)
    assert image_size(source) == (5, 7)


# EXIF 2.3, tag 274: where the stored row 0 and column 0 are seen.
SEEN = {
  1: ("top", "left"),
  2: ("top", "right"),
  3: ("bottom", "right"),
  4: ("bottom", "left"),
  5: ("left", "top"),
  6: ("right", "top"),
  7: ("right", "bottom"),
  8: ("left", "bottom"),
}


def stored(upright, orientation):
  """Returns the pixels that a camera stores of an upright image."""
  row, column = SEEN[orientation]
  out = upright if row in ("top", "bottom") else upright.swapaxes(0, 1)
  out = out[::-1] if row in ("bottom", "right") else out
  return out[:, ::-1] if column in ("bottom", "right") else out


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", SEEN)
def test_exif_turns_the_image_upright(form, orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  turned = np.ascontiguousarray(stored(RGB, orientation))
  data = file_of(turned, form, exif=exif)
  np.testing.assert_array_equal(open_image(data), RGB)
  assert image_size(data) == (5, 7)


def test_exif_behind_a_png_s_pixels_counts_as_well():
  exif = Image.Exif()
  exif[0x0112] = 6
  body = exif.tobytes().removeprefix(b"Exif\x00\x00")
  turned = stored(RGB, 6)
  rows = b"".join(b"\0" + row.tobytes() for row in turned)
  data = png(5, 7, 8, 2, rows, after=[(b"eXIf", body)])
  assert data.index(b"IDAT") < data.index(b"eXIf")
  np.testing.assert_array_equal(open_image(data), RGB)
  assert image_size(data) == (5, 7)


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_orientation_that_exif_does_not_have_is_none(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  found = open_image(file_of(RGB, "PNG", exif=exif))
  np.testing.assert_array_equal(found, RGB)


@pytest.mark.parametrize("backdrop", [(255, 255, 255), (10, 200, 90)])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_the_backdrop(mode, backdrop):
  alpha = np.array([[0, 255, 128, 1, 254, 77, 200]] * 5, np.uint8)
  image = Image.fromarray(RGB).convert(mode[:-1]).convert(mode)
  image.putalpha(Image.fromarray(alpha))
  colour = np.array(image.convert("RGBA"))[..., :3]
  found = open_image(file_of(image, "PNG"), backdrop=backdrop)
  share = alpha[..., None] / 255
  want = share * colour + (1 - share) * np.array(backdrop)
  assert np.abs(found - want).max() < 1  # rounded to a level
  np.testing.assert_array_equal(found[:, 0], [backdrop] * 5)
  np.testing.assert_array_equal(found[:, 1], colour[:, 1])


def test_a_transparent_colour_is_the_backdrop_everywhere():
  grey = np.array([[0, 7, 200], [7, 7, 255]], np.uint8)
  want = np.where(grey == 7, 255, grey)[..., None].repeat(3, -1)
  found = open_image(file_of(grey, "PNG", transparency=7))
  np.testing.assert_array_equal(found, want)
  colours = np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8)
  found = open_image(file_of(colours, "PNG", transparency=(1, 2, 3)))
  np.testing.assert_array_equal(found, [[[255] * 3, [9] * 3]])


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_palettes(form):
  image = Image.new("P", (3, 1))
  image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
  image.putdata([0, 1, 2])
  solid = [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
  np.testing.assert_array_equal(open_image(file_of(image, form)), solid)
  found = open_image(file_of(image, form, transparency=1))
  np.testing.assert_array_equal(found, [[solid[0][0], [255] * 3, solid[0][2]]])


def test_alpha_in_a_palette():
  image = Image.new("P", (2, 1))
  image.putpalette([200, 100, 0, 40, 50, 60])
  image.putdata([0, 1])
  found = open_image(file_of(image, "PNG", transparency=bytes([51, 255])))
  # 51 / 255 = 1/5: 200/5 + 4 * 255/5, and so on.
  np.testing.assert_array_equal(found, [[[244, 224, 204], [40, 50, 60]]])


def test_grey_and_bits():
  grey = RGB[..., 0]
  want = grey[..., None].repeat(3, -1)
  np.testing.assert_array_equal(open_image(file_of(grey, "PNG")), want)
  bits = Image.fromarray(grey > 100)
  found = open_image(file_of(bits, "PNG"))
  np.testing.assert_array_equal(found[..., 0], (grey > 100) * 255)


def test_sixteen_bits_keep_the_high_byte_in_grey_as_in_colour():
  values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
  want = (values >> 8).astype(np.uint8)[..., None].repeat(3, -1)
  found = open_image(file_of(Image.fromarray(values), "PNG"))
  np.testing.assert_array_equal(found, want)
  np.testing.assert_array_equal(
    open_image(file_of(Image.fromarray(values), "TIFF")), want
  )
  portable = b"P5 256 256 65535\n" + values.astype(">u2").tobytes()
  np.testing.assert_array_equal(open_image(portable), want)
  # Pillow reads 16-bit colour itself.
  colour = values.astype(">u2")[..., None].repeat(3, -1)
  rows = b"".join(b"\0" + row.tobytes() for row in colour)
  np.testing.assert_array_equal(open_image(png(256, 256, 16, 2, rows)), want)


def tiff(bits: int, photometric: int, samples: bytes) -> bytes:
  """Returns an uncompressed TIFF of 16 x 16 samples of grey."""
  tags = {256: 16, 257: 16, 258: bits, 259: 1, 262: photometric, 273: 134}
  tags |= {277: 1, 278: 16, 279: len(samples)}
  out = b"II*\0" + struct.pack("<IH", 8, len(tags))
  for tag, value in tags.items():
    kind = (4, 1) if tag in (273, 279) else (3, 1)
    out += struct.pack("<HHII", tag, *kind, value)
  out = (out + bytes(4)).ljust(134, b"\0")
  return out + samples


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_deep_tiffs_are_as_bright_as_they_say(bits, white_is_zero):
  high = np.arange(256, dtype=np.int64)
  low = RNG.integers(0, 1 << (bits - 8), 256)
  values = high << (bits - 8) | low
  if bits == 12:  # two samples in three bytes
    a, b = values[::2], values[1::2]
    parts = [a >> 4, (a & 15) << 4 | b >> 8, b & 255]
    samples = np.stack(parts, axis=-1).astype(np.uint8).tobytes()
  else:
    samples = values.astype(f"<u{bits // 8}").tobytes()
  if white_is_zero and bits == 12:
    with pytest.raises(UserError, match="expected|no image"):
      open_image(tiff(bits, 0, samples))
    return
  found = open_image(tiff(bits, int(not white_is_zero), samples))
  want = 255 - high if white_is_zero else high
  np.testing.assert_array_equal(found[..., 0].reshape(-1), want)


def test_sixteen_bits_with_a_transparent_value():
  values = np.array([[300, 65535, 301]], ">u2")
  data = png(3, 1, 16, 0, b"\0" + values.tobytes(), [(b"tRNS", b"\x01\x2c")])
  np.testing.assert_array_equal(open_image(data)[0, :, 0], [255, 255, 1])


def test_cmyk_is_pillow_s_and_white_is_no_ink():
  ink = np.zeros((8, 16, 4), np.uint8)
  ink[:, 8:, 3] = 255
  image = Image.fromarray(ink, "CMYK")
  data = file_of(image, "JPEG", quality=95)
  found = open_image(data)
  want = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
  np.testing.assert_array_equal(found, want)
  assert found[:, :6].min() > 250 and found[:, 10:].max() < 5


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_its_first_frame_or_refused(form):
  frames = [Image.new("RGB", (4, 3), (c, c, c)) for c in (0, 255)]
  data = file_of(frames[0], form, save_all=True, append_images=frames[1:])
  assert not open_image(data).any()
  with pytest.raises(UserError, match="an animation of 2 frames.*first"):
    open_image(data, animation="refuse")
  np.testing.assert_array_equal(
    open_image(file_of(RGB, "PNG"), animation="refuse"), RGB
  )


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_what_has_no_agreed_white_is_refused(mode):
  with pytest.raises(UserError, match=f"mode {mode}.*8 bits"):
    open_image(file_of(Image.new(mode, (3, 2)), "TIFF"))


@pytest.mark.parametrize("form", [*LOSSLESS, "JPEG", "GIF", "AVIF"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.9])
def test_truncated_files_are_refused(form, share, tmp_path):
  noise = RNG.integers(0, 256, (40, 30, 3), dtype=np.uint8)
  data = file_of(noise, form)
  path = tmp_path / "photo.img"
  path.write_bytes(data[: int(len(data) * share)])
  with pytest.raises(UserError, match="photo.img: (a damaged|no) image"):
    open_image(path)


def test_what_is_no_image_of_a_format_that_is_read(tmp_path):
  for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"text"):
    with pytest.raises(UserError, match="no image of a format.*starts with"):
      open_image(data)
  assert "EPS" not in FORMATS
  path = tmp_path / "empty.png"
  path.write_bytes(b"")
  cases = {
    path: "empty.png: an empty file",
    tmp_path: "a folder, expected an image",
    tmp_path / "none.png": "none.png: no such file",
    "https://example.org/a.png": "only local files",
    "data:image/png;base64,AAAA": "only local files",
  }
  for source, words in cases.items():
    for read in (open_image, image_size):
      with pytest.raises(UserError, match=words):
        read(source)


def test_a_bomb_is_refused_by_its_header():
  data = png(12_000, 12_000, 1, 0, b"\0" * (1501 * 12_000))
  assert len(data) < 20_000
  tracemalloc.start()
  for read in (open_image, image_size):
    with pytest.raises(UserError, match="144,000,000 pixels, expected at most"):
      read(data)
  # Beyond what Pillow itself refuses.
  huge = png(60_000, 60_000, 8, 0, b"")
  with pytest.raises(UserError, match="scale the image down"):
    open_image(huge, max_pixels=10**12)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 2 << 20


def test_the_limit_is_of_pixels_and_the_caller_s():
  data = file_of(RGB, "PNG")
  assert open_image(data, max_pixels=35).shape == (5, 7, 3)
  with pytest.raises(UserError, match="7 x 5 = 35 pixels, expected at most 34"):
    open_image(data, max_pixels=34)


def test_images_without_pixels_are_refused():
  data = png(0, 5, 8, 2, b"")
  gif = b"GIF89a" + struct.pack("<HH", 0, 3) + b"\0\0\0" + b";"
  for broken in (data, gif):
    with pytest.raises(UserError):
      open_image(broken)


@pytest.mark.parametrize("form", FORMATS)
def test_damaged_files_are_read_or_refused(form):
  """What is read has the size that the header says."""
  photo = np.add.outer(np.arange(24) * 5, np.arange(32) * 3)
  photo = photo[..., None] + np.array([0, 40, 90])
  data = file_of(photo.astype(np.uint8), form)
  r, outcomes = random.Random(form), []
  for _ in range(60):
    broken = bytes(mutations.of_bytes(r, data, data))
    try:
      found = open_image(broken, max_pixels=1 << 20)
    except UserError as e:
      assert 0 < len(str(e)) < 400
      outcomes.append("refused")
    else:
      assert found.shape[:2] == image_size(broken)
      outcomes.append("read")
  # AVIF's and WebP's readers notice nearly all damage.
  assert "refused" in outcomes
  assert form in ("AVIF", "WEBP") or "read" in outcomes
