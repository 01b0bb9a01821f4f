"""What an image file's pixels mean, as RGB of 8 bits; or, where that is not known, why the file is refused.

Honoured: orientation, palettes, grey, CMYK, 16 bits, transparency (over white). Refused: several pictures in
one file, depths whose range the file does not tell. Colour profiles are not applied, as nowhere in CLIP's own
preprocessing.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
"""Pillow's names; its other readers, of which one starts a program, are not asked."""
MOST_PIXELS = 89_478_485
"""Where Pillow begins to speak of bombs: 256 MiB of RGB."""
PLAIN = {"1", "L", "P", "RGB", "CMYK", "YCbCr"}
SEE_THROUGH = {"LA", "PA", "RGBA"}
DEEP = {"I", "I;16", "I;16B", "I;16L"}
DEEPEST = 65535
WHITE = (255, 255, 255, 255)
TAG_BITS, TAG_PHOTOMETRIC, TAG_SAMPLE = 258, 262, 339


class Refused(ValueError):
    """An image that is not read; the message goes on from the name of its place."""


@contextmanager
def strictly() -> Iterator[None]:
    """Cut-off files are refused whatever others set; bombs are errors; other warnings of Pillow are not told."""
    from PIL import Image, ImageFile

    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def picture(data: bytes) -> Image:
    """An encoded image as RGB, the way it is meant to be looked at. Refused says what is wrong with it."""
    from PIL import Image, UnidentifiedImageError

    if not isinstance(data, bytes | bytearray | memoryview):
        raise Refused(f"holds {type(data).__name__}, not the bytes of an image")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check(image, bytes(data[:25]))
            image.load()
            _turn(image)
            return _rgb(image)
    except Refused:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refused(f"has more than {MOST_PIXELS // 10**6} million pixels") from None
    except UnidentifiedImageError:
        raise Refused(f"holds no readable image (known formats: {', '.join(FORMATS)})") from None
    except Exception as error:  # decoders meet damage with whatever they stumble over
        raise Refused(f"holds no readable image ({type(error).__name__}: {str(error)[:200]})") from None


def _check(image: Image, head: bytes) -> None:
    """Refused unless it is known what the file's pixels mean."""
    width, height = image.size
    if width < 1 or height < 1:
        raise Refused(f"has no pixels ({width} x {height})")
    if width * height > MOST_PIXELS:
        raise Refused(f"has {width} x {height} pixels; at most {MOST_PIXELS // 10**6} million are read")
    if image.mode not in PLAIN | SEE_THROUGH | DEEP:
        raise Refused(
            f"has pixels of mode {image.mode}, whose range is not known; store 8 or 16 bits a channel"
        )
    # MPO is a JPEG with previews after it
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise Refused("holds several pictures (frames or pages); keep one")
    if image.format == "TIFF":
        _check_tiff(image)
    elif image.mode in DEEP and image.format not in ("PNG", "PPM"):
        raise Refused(f"has pixels of mode {image.mode} in {image.format}, whose range is not known")
    if image.format == "PNG" and "transparency" in image.info and image.mode != "P" and head[24] != 8:
        raise Refused(f"has {head[24]} bits a channel and a transparent colour; store transparency as alpha")


def _check_tiff(image: Image) -> None:
    """Whole numbers without a sign, 16 bits or up to 8 of them, black at 0 where Pillow does not turn that."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits, kinds = set(tags.get(TAG_BITS, (1,))), set(tags.get(TAG_SAMPLE, (1,)))
    if kinds != {1} or len(bits) != 1 or not bits <= {1, 2, 4, 8, 16}:
        told = f"{sorted(bits)[:4]} bits, kind {sorted(kinds)[:4]}"
        raise Refused(f"has samples of {told}; store 8 or 16 bits unsigned")
    if image.mode in DEEP and tags.get(TAG_PHOTOMETRIC) != 1:
        raise Refused("has 16 bits with white at 0; store black at 0")


def _turn(image: Image) -> None:
    """Turned and mirrored as its tags say. A damaged block of tags counts as none, as in every viewer."""
    from PIL import ImageOps

    try:
        ImageOps.exif_transpose(image, in_place=True)
    except (SyntaxError, struct.error, ValueError, TypeError, KeyError, IndexError, OSError, EOFError):
        return


def _rgb(image: Image) -> Image:
    if image.mode in DEEP:
        return _shallow(image)
    if image.mode not in SEE_THROUGH and "transparency" not in image.info:
        return image.convert("RGB")
    return _over_white(image.convert("RGBA"))


def _over_white(image: Image) -> Image:
    from PIL import Image as images

    if image.getchannel("A").getextrema()[0] == 255:
        return image.convert("RGB")
    return images.alpha_composite(images.new("RGBA", image.size, WHITE), image).convert("RGB")


def _shallow(image: Image) -> Image:
    """16 bits of grey as 8: 65535 is white."""
    import numpy as np
    from PIL import Image as images

    if "transparency" in image.info:
        raise Refused("has 16 bits and a transparent colour; store transparency as alpha")
    stored = np.asarray(image)
    if stored.min() < 0 or stored.max() > DEEPEST:
        raise Refused(f"has values outside of 0..{DEEPEST}, whose range is not known")
    values = stored.astype(np.uint32)
    values *= 255
    values += DEEPEST // 2
    values //= DEEPEST
    return images.fromarray(values.astype(np.uint8)).convert("RGB")
