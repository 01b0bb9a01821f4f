"""What an image file's pixels mean: tags, depths, palettes, transparency; and what is refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from mergesec.contracts import ContractError
from mergesec_tasks.vision._pixels import DEEPEST, MOST_PIXELS, Refused, picture, strictly
from mergesec_tasks.vision.folder import decode

RED, BLUE, CLEAR = (255, 0, 0), (0, 0, 255), (0, 0, 0)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read(data: bytes) -> NDArray[np.uint8]:
    """Pixels ``[H, W, 3]``."""
    with strictly():
        return np.asarray(picture(data))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )  # fmt: skip


def quarters() -> Image.Image:
    """Each corner another colour, wider than high: every turn shows."""
    image = Image.new("RGB", (32, 16), (250, 250, 250))
    for colour, box in (
        ((250, 0, 0), (0, 0, 16, 8)),
        ((0, 250, 0), (16, 0, 32, 8)),
        ((0, 0, 250), (0, 8, 16, 16)),
    ):
        image.paste(colour, box)
    return image


# --------------------------------------------------------------------------- honoured


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_tag_is_applied_once(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = quarters()
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    turned = Image.Exif()
    turned[0x0112] = undo
    stored = ImageOps.exif_transpose(_with_exif(upright, turned))
    options: dict[str, Any] = {"exif": exif.tobytes()}
    if kind == "MPO":  # a telephone's picture with a preview after it
        options |= {"save_all": True, "append_images": [Image.new("RGB", (8, 4))], "quality": 95}
    if kind in ("JPEG", "WEBP"):
        options["quality"] = 95
    found = read(saved(stored, kind, **options)).astype(int)
    assert found.shape == (16, 32, 3)
    for row, column in ((4, 8), (4, 24), (12, 8), (12, 24)):
        assert np.abs(found[row, column] - np.asarray(upright)[row, column]).max() < 30


def _with_exif(image: Image.Image, exif: Image.Exif) -> Image.Image:
    found = Image.open(io.BytesIO(saved(image, exif=exif.tobytes())))
    found.load()
    return found


@pytest.mark.parametrize(
    "block", [b"Exif\x00\x00", b"Exif\x00\x00nonsense", b"Exif\x00\x00II*\x00\xff\xff\xff\x7f"]
)
def test_a_damaged_block_of_tags_counts_as_none(block: bytes) -> None:
    assert read(saved(quarters(), "JPEG", exif=block)).shape == (16, 32, 3)


SHADES = [0, 1, 255, 256, 257, 32767, 32768, 65278, 65535]
EIGHT = [round(value * 255 / DEEPEST) for value in SHADES]


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff, big-endian", "pgm"])
def test_16_bits_of_grey_are_scaled(kind: str) -> None:
    row = np.array([SHADES], dtype=np.uint16)
    if kind == "png":
        data = png(len(SHADES), 1, 16, 0, b"\x00" + row.astype(">u2").tobytes())
    elif kind == "pgm":
        data = f"P5 {len(SHADES)} 1 {DEEPEST}\n".encode() + row.astype(">u2").tobytes()
    else:
        order = "<" if kind == "tiff" else ">"
        data = _tiff(row.astype(f"{order}u2").tobytes(), len(SHADES), 16, order=order)
    assert read(data)[0].tolist() == [[value] * 3 for value in EIGHT]


def test_16_bits_of_colour_are_scaled() -> None:
    values = np.array([[[0, 32768, 65535]]], dtype=">u2")
    assert read(png(1, 1, 16, 2, b"\x00" + values.tobytes())).tolist() == [[[0, 128, 255]]]


def test_16_bits_are_turned_too() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(
        3,
        1,
        16,
        0,
        b"\x00" + np.array([0, 32768, 65535], dtype=">u2").tobytes(),
        chunk(b"eXIf", exif.tobytes()[6:]),
    )
    assert read(data)[:, 0, 0].tolist() == [0, 128, 255]


def test_other_range_of_a_portable_grey_map() -> None:
    assert read(b"P5 3 1 1023\n" + np.array([0, 512, 1023], dtype=">u2").tobytes())[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]
    assert read(b"P5 3 1 100\n" + bytes([0, 50, 100]))[0, :, 0].tolist() == [0, 128, 255]


def see_through() -> dict[str, bytes]:
    """Images of one line: red, blue at half strength, and black that is wholly transparent; by kind."""
    rgba = Image.new("RGBA", (3, 1))
    for column, value in enumerate(((*RED, 255), (*BLUE, 128), (*CLEAR, 0))):
        rgba.putpixel((column, 0), value)
    palette = chunk(b"PLTE", bytes([*RED, *BLUE, *CLEAR]))
    return {
        "rgba": saved(rgba),
        "webp": saved(rgba, "WEBP", lossless=True, exact=True),
        "tiff": saved(rgba, "TIFF"),
        "palette": png(3, 1, 8, 3, bytes([0, 0, 1, 2]), palette, chunk(b"tRNS", bytes([255, 128, 0]))),
    }


@pytest.mark.parametrize("kind", ["rgba", "webp", "tiff", "palette"])
def test_what_is_transparent_lies_over_white(kind: str) -> None:
    first, second, third = read(see_through()[kind])[0].tolist()
    assert (first, third) == ([255, 0, 0], [255, 255, 255])
    assert second[2] == 255 and abs(second[0] - 127) <= 1


def test_transparent_grey_and_transparent_colours() -> None:
    grey = Image.new("LA", (2, 1))
    grey.putpixel((0, 0), (40, 255))
    grey.putpixel((1, 0), (40, 0))
    assert read(saved(grey))[0, :, 0].tolist() == [40, 255]
    keyed = png(2, 1, 8, 0, bytes([0, 40, 41]), chunk(b"tRNS", bytes([0, 41])))
    assert read(keyed)[0, :, 0].tolist() == [40, 255]
    keyed = png(2, 1, 8, 2, bytes([0, 1, 2, 3, 4, 5, 6]), chunk(b"tRNS", bytes([0, 4, 0, 5, 0, 6])))
    assert read(keyed)[0].tolist() == [[1, 2, 3], [255, 255, 255]]
    gif = Image.new("P", (2, 1))
    gif.putpalette([*RED, *BLUE])
    gif.putpixel((1, 0), 1)
    assert read(saved(gif, "GIF", transparency=1))[0].tolist() == [[255, 0, 0], [255, 255, 255]]


def test_an_alpha_that_hides_nothing_changes_nothing() -> None:
    image = quarters()
    assert (read(saved(image.convert("RGBA"))) == np.asarray(image)).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_modes_become_what_pillow_makes_of_them(mode: str) -> None:
    image = quarters().convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    assert (read(saved(image, kind)) == np.asarray(image.convert("RGB"))).all()


def test_a_colour_profile_is_not_applied() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert (read(saved(quarters(), icc_profile=profile)) == np.asarray(quarters())).all()


# --------------------------------------------------------------------------- refused


def _tiff(
    pixels: bytes, width: int, bits: int, photometric: int = 1, sample: int = 1, order: str = "<"
) -> bytes:
    """One line of grey, uncompressed."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1),
            (279, len(pixels)), (339, sample)]  # fmt: skip
    pixels += b"\x00" * (len(pixels) % 2)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(pixels))
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return head + pixels + struct.pack(f"{order}H", len(tags)) + entries + struct.pack(f"{order}I", 0)


def _animation(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 120, 240)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "animated gif": (lambda: _animation("GIF"), "several pictures"),
    "animated png": (lambda: _animation("PNG"), "several pictures"),
    "animated webp": (lambda: _animation("WEBP"), "several pictures"),
    "pages": (lambda: _animation("TIFF"), "several pictures"),
    "float": (lambda: saved(Image.new("F", (4, 4), 0.5), "TIFF"), "mode F, whose range is not known"),
    "32 bits": (lambda: saved(Image.new("I", (4, 4), 70000), "TIFF"), r"samples of \[32\] bits"),
    "16 bits with a sign": (lambda: _tiff(b"\x00\x80" * 4, 4, 16, sample=2), r"16\] bits, kind \[2\]"),
    "8 bits with a sign": (lambda: _tiff(b"\x80" * 4, 4, 8, sample=2), r"8\] bits, kind \[2\]"),
    "12 bits": (lambda: _tiff(b"\x80" * 6, 4, 12), r"samples of \[12\] bits"),
    "16 bits, white at 0": (lambda: _tiff(b"\x00\x80" * 4, 4, 16, photometric=0), "white at 0"),
    "lab": (lambda: saved(Image.new("LAB", (4, 4)), "TIFF"), "mode LAB"),
    "float map": (lambda: b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5), "mode F"),
    "4 bits, one of them clear": (
        lambda: png(2, 1, 4, 0, bytes([0, 0x12]), chunk(b"tRNS", bytes([0, 1]))), "4 bits a channel and a transparent"
    ),
    "16 bits, one of them clear": (
        lambda: png(1, 1, 16, 2, bytes([0, 1, 2, 3, 4, 5, 6]), chunk(b"tRNS", bytes([1, 2, 3, 4, 5, 6]))),
        "16 bits a channel and a transparent",
    ),
    "no pixels": (lambda: png(0, 4, 8, 0, b""), "no readable image|no pixels"),
    "no pixels in a bitmap": (lambda: b"P5 0 4 255\n", "no readable image|no pixels"),
    "a postscript program": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "no readable image"),
    "nothing": (lambda: b"", "no readable image"),
    "no bytes": (lambda: 7, "holds int, not the bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_known_meaning_is_refused(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(Refused, match=message):
        read(make())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP"])
def test_a_file_cut_off_is_refused_whatever_others_set(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), kind)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert read(data).shape == (64, 64, 3)
    for share in (0.9, 0.5, 0.1):
        with pytest.raises(Refused):
            read(data[: int(len(data) * share)])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("side", [20_000, 9_460])
def test_a_bomb_is_told_by_its_place(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond where Pillow raises, and where it only warns; and where somebody switched that off."""
    data = png(side, side, 1, 0, b"")
    assert side * side > MOST_PIXELS
    with pytest.raises(ContractError, match=r"^photo\.png has more than 89 million pixels"):
        decode([data], [0], 8, lambda row: "photo.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ContractError, match=rf"^photo\.png has {side} x {side} pixels"):
        decode([data], [0], 8, lambda row: "photo.png")


def test_the_row_is_named_and_warnings_are_not_told(recwarn: pytest.WarningsRecorder) -> None:
    good = saved(quarters(), "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff")
    assert decode([good], [0], 8, str).dtype == torch.uint8
    with pytest.raises(ContractError, match=r"^row 1 holds no readable image"):
        decode([good, b"?"], [0, 1], 8, lambda row: f"row {row}")
    assert not recwarn.list
