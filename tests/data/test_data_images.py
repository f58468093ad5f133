"""Images of all formats: headers and color conversion."""

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data.folder_index import probe
from pipeline.data.images import HEAD, Header, NotAnImage, decode, encode, header, shrink, to_rgb
from tests.data import synthetic

RGB = synthetic.image(1)
WHOLE = synthetic.encoded(RGB)


def alpha(mode: str) -> Image.Image:
    image = RGB.convert(mode)
    image.putalpha(Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60), np.uint8)))
    return image


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (RGB, "PNG"),
        (RGB, "WEBP"),
        (RGB, "BMP"),
        (RGB, "TIFF"),
        (RGB.convert("P"), "PNG"),
        (RGB.convert("1"), "PNG"),
        (alpha("RGBA"), "PNG"),
        (alpha("LA"), "PNG"),
        (RGB.convert("CMYK"), "JPEG"),
    ],
)
def test_colors_are_converted_as_in_pil(image, kind):
    content = synthetic.encoded(image, kind)
    head = header(content, content)
    assert (head.format, head.width, head.height) == (kind, 60, 50)
    assert not head.plain_jpeg
    with Image.open(io.BytesIO(content)) as theirs:
        expected = np.asarray(theirs.convert("RGB"))
    assert np.array_equal(np.asarray(to_rgb(decode(content)).convert("RGB")), expected)


def test_sixteen_bits_are_scaled_and_not_clipped():
    values = np.asarray(RGB.convert("L")).astype(np.uint16)
    content = synthetic.encoded(Image.fromarray(values * 257), "PNG")
    assert np.array_equal(np.asarray(to_rgb(decode(content))), values)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_decode_to_pils_pixels(mode):
    content = synthetic.encoded(RGB.convert(mode))
    assert header(content, content) == Header("JPEG", 60, 50, mode)
    with Image.open(io.BytesIO(content)) as theirs:
        assert np.array_equal(np.asarray(decode(content)), np.asarray(theirs))


def test_bytes_between_complete_segments_are_accepted_and_missing_data_are_not():
    decode(WHOLE[:-2] + b"\0" * 7 + WHOLE[-2:])
    with pytest.raises(NotAnImage, match="cannot be decoded: .*premature end"):
        decode(WHOLE[: len(WHOLE) // 2] + WHOLE[-2:])


def test_a_size_after_large_profiles_is_found(tmp_path):
    comments = b"".join(b"\xff\xfe\xff\xff" + bytes(0xFFFF - 2) for _ in range(3))
    assert len(comments) > HEAD
    (tmp_path / "a.jpg").write_bytes(WHOLE[:2] + comments + WHOLE[2:])
    assert probe(tmp_path / "a.jpg") == Header("JPEG", 60, 50, "RGB")
    (tmp_path / "b.jpg").write_bytes(WHOLE[:2] + comments + b"\xff\xd9")
    assert "corrupt header" in str(probe(tmp_path / "b.jpg"))


def test_shrinking_keeps_the_aspect_ratio_and_never_upscales():
    assert shrink(RGB, 25).size == (30, 25)
    assert shrink(RGB, 50) is RGB
    assert shrink(Image.new("RGB", (4000, 20)), 10).size == (2000, 10)


def test_encoding_omits_metadata_and_is_deterministic():
    turned = RGB.copy()
    turned.info |= {"exif": b"Exif\0\0junk", "icc_profile": b"x" * 100}
    assert encode(turned, 90) == encode(RGB, 90)
