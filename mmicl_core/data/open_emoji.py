"""The embedded corpus: one concept drawn by many hands (open emoji art).

An emoji is a concept, and each openly licensed emoji set is a style that draws it in its own way, so
a concept has up to twelve different real pictures, a name, keywords and a place in a taxonomy. The
art comes from npm and is read out of the package tarballs; nothing inside a package is run.

A picture is drawn in a 64 px box in the middle of a 72 px white canvas: four of the sets exist only
as 64 px bitmaps, and an upscaled bitmap would tell the styles apart by its blur.

The split is part of the corpus. `split.json` names held-out concepts, spread over the subcategories
of the "things" categories, and one held-out style; `mmicl_core.data.splits` enforces it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmicl_core.data.files import atomic_directory
from mmicl_core.errors import DataError

__all__ = ["STYLES", "THINGS", "Style", "build_open_emoji"]

CANVAS_PIXELS = 72
BOX_PIXELS = 64
WEBP_QUALITY = 95
SHARD_IMAGE_BYTES = 2 * 2**20
HELD_OUT_STYLE = "twemoji"
HELD_OUT_MIN_PICTURES = 9
HELD_OUT_SHARE = 0.25
SPLIT_SEED = "open-emoji-1"

THINGS = ("Animals & Nature", "Food & Drink", "Activities", "Travel & Places", "Objects")

NAMES_PACKAGE = "emoji-datasource-google@16.0.0"
LABELS_PACKAGE = "emojibase-data@17.0.0"
KEYWORDS_PACKAGE = "emojilib@4.0.3"

Picture = Callable[[], Image.Image]
Package = Mapping[str, bytes]


@dataclass(frozen=True)
class Style:
    """One emoji set: where its art lies and under which licence it may be passed on."""

    name: str
    package: str
    kind: str
    """`png`, `webp` or `svg` for one file an emoji under `path`; `iconify` for one JSON of all."""
    path: str
    licence: str
    author: str


STYLES = (
    Style("noto", "emoji-datasource-google@16.0.0", "png", "img/google/64", "Apache-2.0", "Google"),
    Style("google-2018", "emoji-datasource-google@4.0.4", "png", "img/google/64", "Apache-2.0", "Google"),
    Style("google-blob", "emoji-datasource-google@3.0.0", "png", "img/google/64", "Apache-2.0", "Google"),
    Style("twemoji", "emoji-datasource-twitter@16.0.0", "png", "img/twitter/64", "CC-BY-4.0", "Twitter, Inc"),
    Style("openmoji", "openmoji@17.0.0", "svg", "color/svg", "CC-BY-SA-4.0", "OpenMoji contributors"),
    Style("openmoji-black", "openmoji@17.0.0", "svg", "black/svg", "CC-BY-SA-4.0", "OpenMoji contributors"),
    Style("fluent-3d", "@lobehub/fluent-emoji-3d@1.1.0", "webp", "assets", "MIT", "Microsoft"),
    Style("fluent-flat", "@iconify-json/fluent-emoji-flat@1.2.6", "iconify", "", "MIT", "Microsoft"),
    Style("fluent-mono", "@iconify-json/fluent-emoji-high-contrast@1.2.6", "iconify", "", "MIT", "Microsoft"),
    Style("emojione-2", "@iconify-json/emojione@1.2.3", "iconify", "", "CC-BY-4.0", "EmojiOne"),
    Style("emojione-1", "@iconify-json/emojione-v1@1.2.3", "iconify", "", "CC-BY-SA-4.0", "EmojiOne"),
    Style("fxemoji", "@iconify-json/fxemoji@1.2.2", "iconify", "", "Apache-2.0", "Mozilla Foundation"),
)


@dataclass(frozen=True)
class Concept:
    """One emoji, whatever its style."""

    concept: str
    code_points: str
    name: str
    unicode_name: str
    keywords: tuple[str, ...]
    category: str
    subcategory: str


def build_open_emoji(
    output: Path,
    packages: Path,
    *,
    categories: tuple[str, ...] = THINGS,
    report: Callable[[str], None] = lambda message: None,
) -> dict[str, int]:
    """Write the corpus into `output` as webdataset tar shards and `split.json`.

    Args:
        packages: folder of npm tarballs; what is missing there is fetched with `npm pack`.
        categories: emoji categories to take; the committed shards hold `THINGS`, pretraining all ten.
        report: called with one line for each finished style.

    Returns:
        Counts: `images`, `concepts`, `held_out_concepts`, `shards`, `bytes`.

    Raises:
        DataError: npm is missing, or a package could not be fetched or lacks its emoji.
    """
    concepts = _read_concepts(packages, categories)
    samples: list[tuple[Concept, Style, bytes, str]] = []
    for style in STYLES:
        before = len(samples)
        package = _open_package(style.package, packages)
        find = _FINDERS[style.kind](style, package)
        for concept in concepts:
            picture = find(concept)
            if picture is not None:
                data, suffix = _encode(picture())
                samples.append((concept, style, data, suffix))
        report(f"{style.name}: {len(samples) - before} pictures ({style.licence}, {style.author})")
    samples.sort(key=lambda sample: (sample[0].concept, sample[1].name))
    with atomic_directory(output) as folder:
        shards = _write_shards(folder, samples)
        held_out = _held_out_concepts(samples)
        split = {"held_out_concepts": held_out, "held_out_style": HELD_OUT_STYLE}
        (folder / "split.json").write_text(json.dumps(split, indent=1) + "\n", encoding="utf-8")
    return {
        "images": len(samples),
        "concepts": len({concept.concept for concept, *_ in samples}),
        "held_out_concepts": len(held_out),
        "shards": len(shards),
        "bytes": sum(shards),
    }


def _open_package(name: str, packages: Path) -> Package:
    """The files of an npm package, by their path below `package/`."""
    scope, _, version = name.rpartition("@")
    tarball = packages / f"{scope.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not tarball.exists():
        _npm_pack(name, packages)
    files: dict[str, bytes] = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            path = member.name.partition("/")[2]
            if member.isfile() and re.search(r"(/64/|/svg/|assets/|\.json$)", path):
                content = archive.extractfile(member)
                assert content is not None
                files[path] = content.read()
    return files


def _npm_pack(name: str, packages: Path) -> None:
    if shutil.which("npm") is None:
        raise DataError(
            f"package {name} is not in {packages} and npm is not installed to fetch it: "
            "install Node.js, or put the tarball that `npm pack` makes there"
        )
    packages.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["npm", "pack", "--silent", name], cwd=packages, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise DataError(f"npm could not fetch {name} into {packages}: {done.stderr.strip()[-300:]}")


def _emoji_key(code_points: str) -> str:
    """Code points without variation selectors and joiners, which the sets write or omit at will."""
    return "-".join(part for part in code_points.lower().split("-") if part not in ("fe0f", "200d"))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _read_concepts(packages: Path, categories: tuple[str, ...]) -> list[Concept]:
    # Two emoji may share a label (the letter M sign and the metro sign); things come first, so that
    # their ids do not depend on which other categories are built beside them.
    entries = json.loads(_open_package(NAMES_PACKAGE, packages)["emoji.json"])
    entries.sort(key=lambda entry: entry["category"] not in THINGS)
    labels = {
        _emoji_key(row["hexcode"]): row
        for row in json.loads(_open_package(LABELS_PACKAGE, packages)["en/data.json"])
    }
    words = json.loads(_open_package(KEYWORDS_PACKAGE, packages)["dist/emoji-en-US.json"])
    keywords = {_emoji_key("-".join(f"{ord(c):04x}" for c in emoji)): tags for emoji, tags in words.items()}
    concepts: dict[str, Concept] = {}
    for entry in entries:
        if entry["category"] not in categories:
            continue
        key = _emoji_key(entry["unified"])
        label = labels[key]
        tags = [*label.get("tags", []), *(tag.replace("_", " ") for tag in keywords.get(key, []))]
        spoken = {tag.lower() for tag in tags if re.fullmatch(r"[A-Za-z][A-Za-z0-9 '-]+", tag)}
        slug = _slug(label["label"])
        concept = Concept(
            concept=slug if slug not in concepts else f"{slug}-{key}",
            code_points=key,
            name=label["label"].lower(),
            unicode_name=entry["name"] or label["label"],
            keywords=tuple(sorted(spoken - {label["label"].lower()})),
            category=entry["category"],
            subcategory=entry["subcategory"],
        )
        concepts[concept.concept] = concept
    return list(concepts.values())


def _files_by_emoji(style: Style, package: Package) -> Callable[[Concept], Picture | None]:
    decode = _render_svg if style.kind == "svg" else _open_bitmap
    by_key = {
        _emoji_key(Path(path).stem): data
        for path, data in package.items()
        if path.startswith(style.path + "/")
    }
    if not by_key:
        raise DataError(f"{style.package}: no picture under {style.path}/")

    def find(concept: Concept) -> Picture | None:
        data = by_key.get(concept.code_points)
        return None if data is None else lambda: decode(data)

    return find


def _icons_by_name(style: Style, package: Package) -> Callable[[Concept], Picture | None]:
    """Iconify sets name their icons in words; `chars.json` maps code points for some of them."""
    icons = json.loads(package["icons.json"])
    bodies = {name: icon["body"] for name, icon in icons["icons"].items()}
    for alias, target in icons.get("aliases", {}).items():
        if set(target) == {"parent"} and target["parent"] in bodies:
            bodies.setdefault(alias, bodies[target["parent"]])
    by_key = {_emoji_key(key): name for key, name in json.loads(package.get("chars.json", b"{}")).items()}
    by_name = {name.replace("-", ""): name for name in sorted(bodies)}
    width, height = icons.get("width", 16), icons.get("height", 16)

    def find(concept: Concept) -> Picture | None:
        spoken = (_slug(concept.name), _slug(concept.unicode_name))
        names = (by_key.get(concept.code_points), *(by_name.get(s.replace("-", "")) for s in spoken))
        body = next((bodies[name] for name in names if name in bodies), None)
        if body is None:
            return None
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
        return lambda: _render_svg(svg.encode())

    return find


_FINDERS: dict[str, Callable[[Style, Package], Callable[[Concept], Picture | None]]] = {
    "png": _files_by_emoji,
    "webp": _files_by_emoji,
    "svg": _files_by_emoji,
    "iconify": _icons_by_name,
}


def _open_bitmap(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGBA")


def _render_svg(data: bytes) -> Image.Image:
    # Rendering is only needed to build a corpus, so the renderer is an extra of this package.
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=data.decode(), width=4 * BOX_PIXELS, height=4 * BOX_PIXELS)
    return _open_bitmap(bytes(png))


def _encode(picture: Image.Image) -> tuple[bytes, str]:
    """The picture on white, as WebP or PNG, whichever is smaller."""
    picture.thumbnail((BOX_PIXELS, BOX_PIXELS), Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (CANVAS_PIXELS, CANVAS_PIXELS), "white")
    corner = ((CANVAS_PIXELS - picture.width) // 2, (CANVAS_PIXELS - picture.height) // 2)
    canvas.paste(picture, corner, picture)
    webp, png = io.BytesIO(), io.BytesIO()
    canvas.save(webp, "WEBP", quality=WEBP_QUALITY, method=6)
    # A palette is only taken where it holds every colour, so PNG never loses anything.
    colours = canvas.getcolors(256)
    (canvas.quantize(len(colours), dither=Image.Dither.NONE) if colours else canvas).save(
        png, "PNG", optimize=True
    )
    return min(((webp.getvalue(), "webp"), (png.getvalue(), "png")), key=lambda pair: len(pair[0]))


def _write_shards(folder: Path, samples: list[tuple[Concept, Style, bytes, str]]) -> list[int]:
    """Webdataset tar shards; a sample's members share a key and lie together. Sizes in bytes."""
    sizes: list[int] = []
    for number, shard in enumerate(_shards(samples)):
        path = folder / f"open-emoji-{number:03d}.tar.gz"
        # Two 512-byte headers weigh more than a picture of this size, and gzip removes them. No time
        # and no name in the gzip header: the same packages give the same bytes.
        with (
            path.open("wb") as file,
            gzip.GzipFile("", "wb", 9, file, mtime=0) as zipped,
            tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for concept, style, data, suffix in shard:
                key = f"{concept.concept}__{style.name}"
                _add(archive, f"{key}.json", json.dumps(_metadata(concept, style)).encode())
                _add(archive, f"{key}.{suffix}", data)
        sizes.append(path.stat().st_size)
    return sizes


def _shards(
    samples: list[tuple[Concept, Style, bytes, str]],
) -> Iterator[list[tuple[Concept, Style, bytes, str]]]:
    shard: list[tuple[Concept, Style, bytes, str]] = []
    size = 0
    for sample in samples:
        shard.append(sample)
        size += len(sample[2])
        if size >= SHARD_IMAGE_BYTES:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _metadata(concept: Concept, style: Style) -> dict[str, Any]:
    return {
        "concept": concept.concept,
        "name": concept.name,
        "keywords": list(concept.keywords),
        "category": concept.category,
        "subcategory": concept.subcategory,
        "style": style.name,
        "licence": style.licence,
        "source": f"npm:{style.package}",
    }


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _held_out_concepts(samples: list[tuple[Concept, Style, bytes, str]]) -> list[str]:
    """A share of each things subcategory's well-drawn concepts, chosen by hash.

    A concept needs `HELD_OUT_MIN_PICTURES` pictures in training styles, eight shots and a query, and
    its subcategory needs two held-out concepts, or it could not meet a hard negative.
    """
    pictures: dict[str, int] = {}
    subcategory: dict[str, str] = {}
    for concept, style, *_ in samples:
        if concept.category in THINGS:
            pictures[concept.concept] = pictures.get(concept.concept, 0) + (style.name != HELD_OUT_STYLE)
            subcategory[concept.concept] = concept.subcategory
    rich: dict[str, list[str]] = {}
    for name, count in pictures.items():
        if count >= HELD_OUT_MIN_PICTURES:
            rich.setdefault(subcategory[name], []).append(name)
    held_out: list[str] = []
    for names in rich.values():
        quota = round(HELD_OUT_SHARE * len(names))
        if quota >= 2:
            held_out += sorted(names, key=_draw)[:quota]
    return sorted(held_out)


def _draw(name: str) -> str:
    return hashlib.sha256(f"{SPLIT_SEED}/{name}".encode()).hexdigest()
