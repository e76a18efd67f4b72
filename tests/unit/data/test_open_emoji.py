from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmicl_core.data import open_emoji
from mmicl_core.data.open_emoji import STYLES, Concept, Style, build_open_emoji
from mmicl_core.data.splits import Split
from mmicl_core.data.storage import Location
from mmicl_core.errors import DataError
from tests.corpora import read_shards
from tests.fakes import draw_picture, encode_picture

NOTO = STYLES[0]


def _concept(name: str, subcategory: str = "cats", category: str = "Animals & Nature") -> Concept:
    return Concept(name, "1f431", name, name, ("pet",), category, subcategory)


def _samples(counts: dict[str, int], subcategory: str = "cats") -> list[tuple[Concept, Style, bytes, str]]:
    styles = [style for style in STYLES if style.name != open_emoji.HELD_OUT_STYLE]
    return [
        (_concept(name, subcategory), style, b"", "png")
        for name, count in counts.items()
        for style in styles[:count]
    ]


def test_encoding_takes_png_for_flat_pictures_and_loses_nothing() -> None:
    picture = draw_picture(5, side=64).convert("RGBA")
    data, suffix = open_emoji._encode(picture.copy())
    assert suffix == "png"
    with Image.open(io.BytesIO(data)) as found:
        pixels = np.asarray(found.convert("RGB"))
    assert pixels.shape == (72, 72, 3)
    assert np.array_equal(pixels[4:68, 4:68], np.asarray(picture.convert("RGB")))
    assert (pixels[:4] == 255).all() and (pixels[:, 68:] == 255).all()


def test_encoding_keeps_every_colour_of_a_full_palette() -> None:
    # 255 colours and the white of the border are the most that a palette holds.
    colours = np.random.default_rng(0).integers(0, 255, (255, 3), dtype=np.uint8)
    pixels = colours[np.arange(64 * 64) % 255].reshape(64, 64, 3)
    data, suffix = open_emoji._encode(Image.fromarray(pixels).convert("RGBA"))
    assert suffix == "png"
    with Image.open(io.BytesIO(data)) as found:
        assert found.mode == "P"
        assert np.array_equal(np.asarray(found.convert("RGB"))[4:68, 4:68], pixels)


def test_encoding_takes_webp_where_it_is_smaller() -> None:
    ramp = np.linspace(0, 255, 64)
    pixels = np.stack(
        [ramp[None] + 0 * ramp[:, None], ramp[:, None] + 0 * ramp[None], 128 + 0 * ramp * ramp[:, None]]
    )
    noise = np.random.default_rng(0).normal(0, 2, pixels.shape)
    picture = Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).convert(
        "RGBA"
    )
    data, suffix = open_emoji._encode(picture)
    assert suffix == "webp"
    with Image.open(io.BytesIO(data)) as found:
        # Quality 95 on noise of two grey levels: a mean error of three levels is not seen.
        error = np.abs(
            np.asarray(found.convert("RGB"), float)[4:68, 4:68] - np.asarray(picture.convert("RGB"), float)
        )
    assert error.mean() < 3


def test_large_art_is_fitted_into_the_box_and_transparency_becomes_white() -> None:
    picture = Image.new("RGBA", (256, 128), (255, 0, 0, 0))
    data, _ = open_emoji._encode(picture)
    with Image.open(io.BytesIO(data)) as found:
        assert found.size == (72, 72)
        assert (np.asarray(found.convert("RGB")) == 255).all()


def test_emoji_keys_ignore_what_the_sets_write_or_omit_at_will() -> None:
    assert open_emoji._emoji_key("1F3F3-FE0F-200D-1F308") == open_emoji._emoji_key("1f3f3-1f308")
    assert open_emoji._emoji_key("1f3f3") != open_emoji._emoji_key("1f3f4")


def test_held_out_concepts_are_a_quarter_of_the_well_drawn_and_the_same_in_any_order() -> None:
    rich = {f"cat {number}": 11 for number in range(12)}
    samples = _samples(rich | {f"poor cat {number}": 8 for number in range(12)})
    held_out = open_emoji._held_out_concepts(samples)
    assert len(held_out) == 3 and set(held_out) <= rich.keys()
    assert open_emoji._held_out_concepts(samples[::-1]) == held_out


def test_held_out_concepts_never_stand_alone_in_a_subcategory() -> None:
    # A quarter of five rounds to one, which would never meet a hard negative.
    assert open_emoji._held_out_concepts(_samples({f"cat {number}": 11 for number in range(5)})) == []
    assert len(open_emoji._held_out_concepts(_samples({f"cat {number}": 11 for number in range(8)}))) == 2


def test_held_out_concepts_are_things_only() -> None:
    faces = [
        (_concept(f"face {number}", "faces", "Smileys & Emotion"), style, b"", "png")
        for number in range(12)
        for style in STYLES
    ]
    assert open_emoji._held_out_concepts(faces) == []


def test_shards_are_the_same_bytes_for_the_same_samples_and_read_back(tmp_path: Path) -> None:
    data = encode_picture(draw_picture(0))
    samples = [(_concept(f"cat-{number}"), NOTO, data, "png") for number in range(5)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        open_emoji._write_shards(tmp_path / name, samples)
    (one,), (two,) = (tmp_path / "one").iterdir(), (tmp_path / "two").iterdir()
    assert one.read_bytes() == two.read_bytes()
    rows = read_shards(tmp_path / "one")
    assert [row.skipped for row in rows] == [None] * 5
    keys = [f"open-emoji-000/cat-{number}__noto" for number in range(5)]
    assert [row.pair["picture"] for row in rows] == keys
    assert (rows[0].pair["source"], rows[0].pair["licence"]) == (f"npm:{NOTO.package}", NOTO.licence)


def test_shards_are_cut_by_size_and_lose_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_emoji, "SHARD_IMAGE_BYTES", 2500)
    samples = [(_concept(f"cat-{number}"), NOTO, bytes(1000), "png") for number in range(7)]
    assert len(open_emoji._write_shards(tmp_path, samples)) == 3
    keys = [row.pair["picture"].partition("/")[2] for row in read_shards(tmp_path)]
    assert keys == [f"cat-{number}__noto" for number in range(7)]


def test_corpus_is_built_from_package_tarballs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twemoji = next(style for style in STYLES if style.name == "twemoji")
    monkeypatch.setattr(open_emoji, "STYLES", (NOTO, twemoji))
    packages = _packages(tmp_path / "packages")
    counts = build_open_emoji(tmp_path / "corpus", packages)
    rows = [row.pair for row in read_shards(tmp_path / "corpus")]
    assert counts["images"] == len(rows) == 3
    assert [(row["concept"], row["style"]) for row in rows] == [
        ("cat-face", "noto"),
        ("cat-face", "twemoji"),
        ("dog-face", "noto"),
    ]
    assert rows[0]["keywords"] == ["kitty", "pet", "small tiger"]
    assert Split.load(Location(str(tmp_path / "corpus"))).held_out_style == "twemoji"


def test_missing_package_without_npm_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="npm is not installed"):
        build_open_emoji(tmp_path / "corpus", tmp_path)
    assert not (tmp_path / "corpus").exists()


def _packages(folder: Path) -> Path:
    """Tarballs as `npm pack` makes them, of two things and a smiley that the categories leave out."""
    folder.mkdir()
    entries = [
        _entry("1F600", "GRINNING FACE", "Smileys & Emotion", "face-smiling"),
        _entry("1F431", "CAT FACE", "Animals & Nature", "animal-mammal"),
        _entry("1F436", "DOG FACE", "Animals & Nature", "animal-mammal"),
    ]
    art = {f"img/google/64/{code}.png": _art(n) for n, code in enumerate(("1f431", "1f436", "1f600"))}
    _pack(
        folder / "emoji-datasource-google-16.0.0.tgz",
        {"emoji.json": json.dumps(entries).encode()} | art,
    )
    _pack(folder / "emoji-datasource-twitter-16.0.0.tgz", {"img/twitter/64/1f431.png": _art(7)})
    labels = [
        {"hexcode": entry["unified"], "label": entry["name"].lower(), "tags": ["pet", "1st", "Kitty"]}
        for entry in entries
    ]
    _pack(folder / "emojibase-data-17.0.0.tgz", {"en/data.json": json.dumps(labels).encode()})
    words = {"\U0001f431": ["small_tiger", "cat face"]}
    _pack(folder / "emojilib-4.0.3.tgz", {"dist/emoji-en-US.json": json.dumps(words).encode()})
    return folder


def _entry(code: str, name: str, category: str, subcategory: str) -> dict[str, str]:
    return {"unified": code, "name": name, "category": category, "subcategory": subcategory}


def _art(seed: int) -> bytes:
    return encode_picture(draw_picture(seed, side=64))


def _pack(path: Path, files: dict[str, bytes]) -> None:
    with gzip.open(path, "wb") as zipped, tarfile.open(fileobj=zipped, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
