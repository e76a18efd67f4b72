"""Files of pictures that want to break what reads them; equal states of chance, equal bytes."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from PIL import Image

from tests.fakes import draw_picture, encode_picture

__all__ = ["GOOD_PICTURE", "PICTURES"]

MAGIC = {
    "png": b"\x89PNG\r\n\x1a\n",
    "jpeg": b"\xff\xd8\xff\xe0",
    "gif": b"GIF89a",
    "webp": b"RIFF\x20\x00\x00\x00WEBPVP8 ",
    "bmp": b"BM",
}
EXTREME_NUMBERS = (0, 1, 2, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
GOOD_PICTURE = encode_picture(draw_picture(1))
ADAM = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Passes of an interlaced PNG: where each begins, and its steps."""
SEGMENT = 65533
"""Most bytes of a segment of a JPEG."""


# Files without a fault, to begin with.


@cache
def whole_files() -> Mapping[str, bytes]:
    """Small pictures in every format and mode that Pillow writes."""
    rgb = draw_picture(3, 48)
    found = {}
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "PCX", "SGI", "JPEG2000"):
        for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"):
            try:
                found[f"{kind} {mode}"] = _save(_convert(rgb, mode), kind)
            except (OSError, KeyError, ValueError):
                # The format has no such mode.
                continue
    frames = [draw_picture(number, 48) for number in range(4)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        found[f"{kind} frames"] = _save(frames[0], kind, save_all=True, append_images=frames[1:])
    found["JPEG progressive"] = _save(rgb, "JPEG", progressive=True)
    found["WEBP lossless"] = _save(rgb, "WEBP", lossless=True)
    found["PNG transparency"] = _save(_convert(rgb, "P"), "PNG", transparency=bytes(range(200)))
    found["PNG interlaced"] = interlaced_png(48, 40)
    return found


def _convert(picture: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return picture.convert("L").convert("I").point(lambda value: value * 257).convert("I;16")
    return picture.convert("L").convert(mode) if mode in ("I", "F") else picture.convert(mode)


def _save(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    """Of a PNG."""
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data) & 0xFFFFFFFF) + kind + data + struct.pack(">I", crc & 0xFFFFFFFF)


def png(width: int, height: int, data: bytes, *extra: bytes, bits: int = 8, colour: int = 0, way: int = 0):
    """A PNG that declares what it is told to, with `data` as its pixels, compressed."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, way)
    ends = chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return MAGIC["png"] + chunk(b"IHDR", header) + b"".join(extra) + ends


def interlaced_png(width: int, height: int) -> bytes:
    """Grey."""
    rows = b""
    for left, top, right, down in ADAM:
        columns, lines = -(-(width - left) // right), -(-(height - top) // down)
        rows += (b"\0" + bytes([right * 30]) * columns) * lines
    return png(width, height, zlib.compress(rows), way=1)


# Damage that any file can suffer.


def truncated(chance: random.Random) -> bytes:
    data = _any(chance)
    return data[: chance.randrange(len(data))]


def bits_flipped(chance: random.Random) -> bytes:
    data = bytearray(_any(chance))
    for _ in range(chance.choice((1, 2, 8, 64))):
        data[_place(chance, data)] ^= 1 << chance.randrange(8)
    return bytes(data)


def numbers_replaced(chance: random.Random) -> bytes:
    """Sizes, counts and offsets, in either order of bytes."""
    data = bytearray(_any(chance))
    for _ in range(chance.choice((1, 1, 3))):
        place, order = _place(chance, data), chance.choice("<>")
        data[place : place + 4] = struct.pack(f"{order}I", chance.choice(EXTREME_NUMBERS))
    return bytes(data)


def spliced(chance: random.Random) -> bytes:
    one, other = _any(chance), _any(chance)
    return one[: chance.randrange(len(one))] + other[chance.randrange(len(other)) :]


def repeated(chance: random.Random) -> bytes:
    data = _any(chance)
    begin = chance.randrange(len(data))
    end = chance.randint(begin, len(data))
    return data[:end] + data[begin:end] * chance.choice((1, 50)) + data[end:]


def unread_format(chance: random.Random) -> bytes:
    names = [name for name in whole_files() if name.split()[0] not in ("PNG", "JPEG", "WEBP", "GIF", "BMP")]
    return whole_files()[chance.choice(names)]


def odd_mode(chance: random.Random) -> bytes:
    return whole_files()[chance.choice(list(whole_files()))]


def garbage(chance: random.Random) -> bytes:
    return chance.choice([b"", *MAGIC.values()]) + chance.randbytes(chance.choice((1, 7, 100, 5000)))


def nearly_nothing(chance: random.Random) -> bytes:
    magic = chance.choice(list(MAGIC.values()))
    return chance.choice((b"", b"\0", b"\n", magic, magic[:2], b"\0" * 4096, b"\xff" * 4096))


# PNG.


def png_chunks_shuffled(chance: random.Random) -> bytes:
    chunks = list(_chunks(whole_files()[chance.choice(("PNG P", "PNG RGBA", "PNG frames", "PNG I;16"))]))
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(chunks))
        kind, data = chunks[place]
        chunks[place : place + 1] = chance.choice(
            (
                [],
                [(kind, data)] * 3,
                [(kind, data[: len(data) // 2])],
                [(kind, chance.randbytes(len(data)))],
                [(bytes(chance.choices(b"azAZ", k=4)), data)],
                [(chance.choice((b"PLTE", b"tRNS", b"IHDR", b"IEND", b"acTL", b"fdAT", b"gAMA")), data)],
            )
        )
        chunks = chunks or [(b"IEND", b"")]
    if chance.random() < 0.3:
        chance.shuffle(chunks)
    return MAGIC["png"] + b"".join(chunk(kind, data) for kind, data in chunks)


def png_of_wrong_sums(chance: random.Random) -> bytes:
    chunks = _chunks(whole_files()[chance.choice(("PNG RGB", "PNG P", "PNG interlaced"))])
    return MAGIC["png"] + b"".join(
        chunk(kind, data, chance.choice((None, 0, chance.getrandbits(32)))) for kind, data in chunks
    )


def png_of_huge_size(chance: random.Random) -> bytes:
    sizes = (2**31 - 1, 2**31, 2**32 - 1, 100_000, 65536, 20_000, 4000)
    bits, colour = chance.choice(((1, 0), (8, 2), (16, 6), (8, 3), (7, 9)))
    width, height = chance.choice(sizes), chance.choice(sizes)
    return png(width, height, zlib.compress(bytes(1000)), bits=bits, colour=colour, way=chance.choice((0, 1)))


def png_bomb(chance: random.Random) -> bytes:
    """Within the limit of pixels, and far more data behind them than they need."""
    return png(64, 64, zeros(chance.choice((2**20, 2**26))), colour=chance.choice((0, 6)))


def png_text_bomb(chance: random.Random) -> bytes:
    packed = zeros(chance.choice((2**20 + 1, 2**26)))
    extra = chance.choice(
        (
            chunk(b"zTXt", b"key\0\0" + packed),
            chunk(b"iTXt", b"key\0\1\0\0\0" + packed),
            chunk(b"iCCP", b"key\0\0" + packed),
            chunk(b"zTXt", b"key\0\0" + packed) * 5,
            chunk(b"tEXt", b"key\0" + b"x" * 100) * 20_000,
            chunk(b"iCCP", b"key\0\1" + packed[:100]),
            chunk(b"eXIf", exif(chance)),
        )
    )
    return png(2, 2, zlib.compress(b"\0\1\2" * 2), extra)


def png_of_most_pixels(chance: random.Random) -> bytes:
    bits, colour, channels = chance.choice(((8, 0, 1), (8, 2, 3), (16, 6, 8)))
    return png(3999, 4000, zeros((3999 * channels + 1) * 4000), bits=bits, colour=colour)


def png_animation(chance: random.Random) -> bytes:
    def numbers(count: int) -> tuple[int, ...]:
        return tuple(chance.choice(EXTREME_NUMBERS) for _ in range(count))

    control = chunk(b"acTL", struct.pack(">II", *numbers(2)))
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", *numbers(5), 1, 0, chance.randrange(9), 9))
    return png(2, 2, zlib.compress(b"\0\1\2" * 2), control, frame * chance.choice((1, 1000)))


def extreme_sides(chance: random.Random) -> bytes:
    """Few pixels, all of them in one row or column."""
    long = chance.choice((300, 5000, 65_500, 1_000_000, 16_000_000))
    width, height = chance.choice(((1, long), (long, 1), (2, long // 2)))
    if long <= 65_500 and chance.random() < 0.5:
        return _save(Image.new("RGB", (width, height)), chance.choice(("JPEG", "GIF", "BMP")))
    return png(width, height, zeros((width + 1) * height))


# JPEG.


def jpeg_of_many_segments(chance: random.Random) -> bytes:
    jpeg = whole_files()["JPEG RGB"]
    kinds = {
        "exif": b"\xff\xe1" + struct.pack(">H", SEGMENT + 2) + b"Exif\0\0" + exif(chance).ljust(SEGMENT - 6),
        "xmp": b"\xff\xe1"
        + struct.pack(">H", SEGMENT + 2)
        + b"http://ns.adobe.com/xap/1.0/\0".ljust(SEGMENT),
        "comment": b"\xff\xfe" + struct.pack(">H", SEGMENT + 2) + b" " * SEGMENT,
        "photoshop": b"\xff\xed" + struct.pack(">H", 300) + b"Photoshop 3.0\x008BIM".ljust(298, b"\xff"),
        "empty": b"\xff\xe5\x00\x02",
    }
    count = chance.choice((1, 10, 40))
    kind = chance.choice(list(kinds))
    return jpeg[:2] + kinds[kind] * (count * 1000 if kind == "empty" else count) + jpeg[2:]


def jpeg_profile(chance: random.Random) -> bytes:
    """A colour profile in as many segments as there can be, or in some that contradict each other."""
    count = chance.choice((1, 50))
    part = bytes(SEGMENT - 14)
    said = chance.choice((count, 0, 255))
    segments = [
        b"\xff\xe2" + struct.pack(">H", SEGMENT + 2) + b"ICC_PROFILE\0" + bytes([number % 256, said]) + part
        for number in range(1, count + 1)
    ]
    jpeg = whole_files()[chance.choice(("JPEG RGB", "JPEG CMYK", "JPEG L"))]
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def jpeg_with_notes(chance: random.Random) -> bytes:
    """A camera's notes, turned on their side, with what no camera writes."""
    notes = b"Exif\0\0" + exif(chance)
    jpeg = whole_files()[chance.choice(("JPEG RGB", "MPO frames", "JPEG progressive"))]
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(notes) + 2) + notes + jpeg[2:]


def exif(chance: random.Random) -> bytes:
    """Tags of all kinds, which point anywhere, themselves included; with a thumbnail that is not there."""
    tags = (0x0112, 0x8769, 0x8825, 0xA005, 0x0201, 0x0202, 0x9286, 0x927C, 0x0100, 0x0111, 0x02BC, 0xC4A5)
    entries = [struct.pack("<HHIHH", 0x0112, 3, 1, chance.randint(1, 9), 0)]
    for _ in range(chance.choice((0, 1, 5, 300))):
        offset = chance.choice((0, 8, 9, chance.randrange(200), chance.choice(EXTREME_NUMBERS)))
        count = chance.choice((0, 1, 2, chance.randrange(20), chance.choice(EXTREME_NUMBERS)))
        kind = chance.randrange(14)
        entries.append(struct.pack("<HHII", chance.choice(tags) + chance.randrange(2), kind, count, offset))
    following = chance.choice((0, 8, 26, 2**32 - 1))
    table = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", following)
    return b"II*\0\x08\0\0\0" + table + chance.randbytes(64)


@cache
def _progressive(side: int) -> tuple[bytes, bytes]:
    """A grey progressive JPEG up to its end, and its last scan."""
    whole = _save(Image.new("L", (side, side), 77), "JPEG", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2], scan


def jpeg_of_many_scans(chance: random.Random) -> bytes:
    """Every scan passes over all of the picture, and takes a few bytes."""
    start, scan = _progressive(chance.choice((64, 1000, 3900)))
    return start + scan * min(chance.choice((10, 1000, 20_000)), 4 * 10**6 // len(scan)) + b"\xff\xd9"


def jpeg_of_other_size(chance: random.Random) -> bytes:
    """The frame header lies about rows and columns."""
    jpeg = bytearray(whole_files()[chance.choice(("JPEG RGB", "JPEG progressive", "JPEG CMYK"))])
    place = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2"))
    sizes = (0, 1, 47, 49, 4000, 65_500, 65_535)
    jpeg[place + 5 : place + 9] = struct.pack(">HH", chance.choice(sizes), chance.choice(sizes))
    if chance.random() < 0.3:
        jpeg[place + 9] = chance.randrange(256)
    return bytes(jpeg)


# GIF, WebP, BMP.


def gif(width: int, height: int, *frames: tuple[int, int, int, int, bytes]) -> bytes:
    """Frames are left, top, width, height and their blocks of codes."""
    start = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    control = b"!\xf9\x04\x04\x00\x00\x00\x00"
    return start + b"".join(
        control + b"," + struct.pack("<HHHHB", *frame[:4], 0) + b"\x02" + frame[4] for frame in frames
    )


ONE_PIXEL = b"\x02\x4c\x01\x00"


def gif_of_many_frames(chance: random.Random) -> bytes:
    size = chance.choice((1, 2000, 4000))
    return gif(size, size, *[(0, 0, 1, 1, ONE_PIXEL)] * 10_000) + b";"


def gif_of_odd_frames(chance: random.Random) -> bytes:
    def size() -> int:
        return chance.choice((0, 1, 2, 4000, 65_535))

    codes = chance.choice((ONE_PIXEL, b"\xff" + b"\x92" * 255 + b"\0", b"\0", b"\xff", chance.randbytes(40)))
    frames = [(size(), size(), size(), size(), codes) for _ in range(chance.choice((1, 3)))]
    return gif(size(), size(), *frames) + chance.choice((b";", b"", b"!\xfe" + b"\xff" * 300))


def webp_of_odd_canvas(chance: random.Random) -> bytes:
    webp = bytearray(whole_files()["WEBP frames"])
    place = webp.index(b"VP8X") + 8
    webp[place] = chance.randrange(256)
    for at in (place + 4, place + 7):
        webp[at : at + 3] = struct.pack("<I", chance.choice((0, 1, 47, 3999, 16_383, 2**24 - 1)))[:3]
    if chance.random() < 0.5:
        webp[4:8] = struct.pack("<I", chance.choice(EXTREME_NUMBERS))
    notes = exif(chance)
    return bytes(webp) + b"EXIF" + struct.pack("<I", len(notes)) + notes


def bmp_of_odd_header(chance: random.Random) -> bytes:
    fields = [chance.choice((*EXTREME_NUMBERS, 40, 54)) for _ in range(9)]
    width, height = chance.choice((1, 48, 4000, 2**31, 2**32 - 48)), chance.choice((1, 48, 4000, 2**32 - 48))
    bits, packing = chance.choice((0, 1, 4, 8, 16, 24, 32, 99)), chance.choice((0, 1, 2, 3, 4, 9))
    size = chance.choice((12, 40, 52, 64, 108, 124, fields[0]))
    header = struct.pack("<IIIHHIIIIII", size, width, height, 1, bits, packing, *fields[1:6])
    return b"BM" + struct.pack("<III", fields[6], 0, chance.choice((54, 0, fields[7]))) + header + bytes(4000)


# What is no picture at all, or several things.


def document(chance: random.Random) -> bytes:
    """Text that names files, or grows when it is read."""
    laughs = b"".join(
        b'<!ENTITY l%d "%s">' % (number, b"&l%d;" % (number - 1) * 10) for number in range(1, 10)
    )
    body = chance.choice(
        (
            b'<!DOCTYPE svg [<!ENTITY l0 "ha">' + laughs + b"]><svg>&l9;</svg>",
            b'<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg><text>&x;</text></svg>',
            b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://169.254.169.254/"/></svg>',
            b"<!doctype html><script>fetch('/v1/models')</script>",
            b"<!--" + b"-->" * 100 + b" " * 400 + b"<!--" * 20,
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n(%pipe%id) (w) file\n",
            b"push graphic-context\nviewbox 0 0 640 480\nfill 'url(https://127.0.0.1/|id)'\n",
            b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n",
        )
    )
    return chance.choice((b"", b"\xef\xbb\xbf", b"\n \t", b'<?xml version="1.0"?>\n')) + body


def polyglot(chance: random.Random) -> bytes:
    """A picture to one reader, something else to another."""
    picture = whole_files()[chance.choice(("PNG RGB", "JPEG RGB", "GIF frames", "WEBP RGB", "BMP RGB"))]
    other = chance.choice((b"PK\3\4" + b"\0" * 60, document(chance), GOOD_PICTURE, b"MZ" + bytes(200)))
    return chance.choice((picture + other, other + picture, picture + picture))


def too_many_bytes(chance: random.Random) -> bytes:
    return GOOD_PICTURE + bytes(4 * 2**20 + chance.choice((-1000, 0, 1)) - len(GOOD_PICTURE))


PICTURES: Mapping[str, Callable[[random.Random], bytes]] = {
    make.__name__.replace("_", " "): make
    for make in (
        truncated,
        bits_flipped,
        numbers_replaced,
        spliced,
        repeated,
        unread_format,
        odd_mode,
        garbage,
        nearly_nothing,
        png_chunks_shuffled,
        png_of_wrong_sums,
        png_of_huge_size,
        png_bomb,
        png_text_bomb,
        png_of_most_pixels,
        png_animation,
        extreme_sides,
        jpeg_of_many_segments,
        jpeg_profile,
        jpeg_with_notes,
        jpeg_of_many_scans,
        jpeg_of_other_size,
        gif_of_many_frames,
        gif_of_odd_frames,
        webp_of_odd_canvas,
        bmp_of_odd_header,
        document,
        polyglot,
        too_many_bytes,
    )
}
"""Makers of files by what they are."""


@cache
def zeros(count: int) -> bytes:
    """So many zeros, compressed to a thousandth."""
    return zlib.compress(bytes(count), 9)


def _any(chance: random.Random) -> bytes:
    return whole_files()[chance.choice(list(whole_files()))]


def _place(chance: random.Random, data: bytearray) -> int:
    """More often in the header than behind it."""
    return chance.randrange(min(len(data), chance.choice((40, 200, len(data)))))


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], 8
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        found.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    return found
