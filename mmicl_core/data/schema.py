"""The tables that stages hand to each other, as Arrow schemas.

IMAGE, where the encoded bytes of a picture lie; they are read by whoever needs pixels, and by nobody before:

| field | meaning |
|---|---|
| `path` | a file: `corpus:` below the corpus, `images:` below `corpus.images`, `copy:` beside the pairs |
| `member` | name inside an archive; empty for a file of its own |
| `offset`, `size` | in bytes |

What cannot be read by its place where it lies (a compressed archive, a Parquet cell, what came by URL) is
copied once, still encoded, and referenced as `copy:`.

PAIR, one picture with what is known of it; every reader gives these rows, and what it does not know is null:

| column | meaning |
|---|---|
| `picture` | key, unique in the corpus: the file's name and the sample's |
| `image` | IMAGE |
| `text` | what is said of it: a caption, or the sentences of a document |
| `turns` | questions and answers about it, of instruction data |
| `task` | the task that the instruction belongs to |
| `document`, `position` | the interleaved document that it stands in, and where |
| `similarity` | of picture and text, where the corpus tells |
| `concept`, `name` | id of what it shows, and that in words |
| `keywords`, `category`, `subcategory` | its place in a taxonomy |
| `style` | whose hand drew it |
| `licence`, `source`, `url` | under which terms it may be passed on, and where it comes from |

DOCUMENT is no table of its own: it is the PAIR rows with the same `document`, by `position`.

LOOKED, what one look at the bytes and pixels of each PAIR row gave, in the same order:

| column | meaning |
|---|---|
| `picture` | key |
| `sha256` | of the encoded bytes, 32 bytes |
| `perceptual_hash` | 64 bits that look-alikes share |
| `width`, `height` | pixels |
| `format` | `JPEG`, `PNG`, `WEBP`, ... |
| `remark` | what is unusual in a picture that is kept: `CMYK`, `16 bits`, `wrong extension`, ... |
| `skipped`, `detail` | why it cannot be used, null if it can, and what exactly was found |

SKIPPED, what was left out, written aside: `picture`, `image`, `skipped`, `detail`.

EPISODE, one prompt that teaches and asks:

| column | meaning |
|---|---|
| `episode` | number; with the seed it determines everything else |
| `id` | `SEED-NUMBER`, by which it can be drawn again |
| `task` | `two_way`, `caption`, `interleaved`, `same_task`, `instruction` |
| `shots_of_both_classes` | demonstrations |
| `concepts`, `names` | the two classes, and what the episode calls them |
| `rank`, `similarity` | of the second class among the neighbours of the first, 1 the nearest; null if none |
| `turns` | pictures with question and answer, the query last; `scored` where the loss counts |
| `answer`, `other` | the right answer for the query, and the wrong name |

A turn names its picture by key, IMAGE, `sha256` and `concept`; one without a picture goes on about the
picture before it.
"""

from __future__ import annotations

import pyarrow as pa

__all__ = ["EPISODE", "IMAGE", "LOOKED", "PAIR", "SCHEMA_VERSION", "SKIPPED", "TURN"]

SCHEMA_VERSION = 2

IMAGE = pa.struct(
    [("path", pa.string()), ("member", pa.string()), ("offset", pa.int64()), ("size", pa.int64())]
)

PAIR = pa.schema(
    [
        ("picture", pa.string()),
        ("image", IMAGE),
        ("text", pa.string()),
        ("turns", pa.list_(pa.struct([("question", pa.string()), ("answer", pa.string())]))),
        ("task", pa.string()),
        ("document", pa.string()),
        ("position", pa.int32()),
        ("similarity", pa.float32()),
        ("concept", pa.string()),
        ("name", pa.string()),
        ("keywords", pa.list_(pa.string())),
        ("category", pa.string()),
        ("subcategory", pa.string()),
        ("style", pa.string()),
        ("licence", pa.string()),
        ("source", pa.string()),
        ("url", pa.string()),
    ]
)

LOOKED = pa.schema(
    [
        ("picture", pa.string()),
        ("sha256", pa.binary(32)),
        ("perceptual_hash", pa.uint64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("remark", pa.string()),
        ("skipped", pa.string()),
        ("detail", pa.string()),
    ]
)

SKIPPED = pa.schema(
    [("picture", pa.string()), ("image", IMAGE), ("skipped", pa.string()), ("detail", pa.string())]
)

TURN = pa.struct(
    [
        ("picture", pa.string()),
        ("image", IMAGE),
        ("sha256", pa.binary(32)),
        ("concept", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("scored", pa.bool_()),
    ]
)

EPISODE = pa.schema(
    [
        ("episode", pa.int64()),
        ("id", pa.string()),
        ("task", pa.string()),
        ("shots_of_both_classes", pa.int32()),
        ("concepts", pa.list_(pa.string())),
        ("names", pa.list_(pa.string())),
        ("rank", pa.int32()),
        ("similarity", pa.float32()),
        ("turns", pa.list_(TURN)),
        ("answer", pa.string()),
        ("other", pa.string()),
    ]
)
