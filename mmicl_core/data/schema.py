"""The tables that stages hand to each other, as Arrow schemas.

PAIR, one picture with what is known of it:

| column | meaning |
|---|---|
| `picture` | key, unique in the corpus |
| `image` | encoded bytes, never decoded before the stage that needs pixels |
| `concept` | id of what it shows; pictures of one concept share it |
| `name`, `keywords` | the concept in words |
| `category`, `subcategory` | its place in the taxonomy, where hard negatives come from |
| `style` | whose hand drew it |
| `licence`, `source` | under which terms it may be passed on, and where it comes from |

EPISODE, one prompt that teaches two names and asks for one of them:

| column | meaning |
|---|---|
| `episode` | number; with the seed it determines everything else |
| `task` | `link` for made-up names, `caption` for true ones |
| `shots` | demonstrations of each class |
| `concepts`, `names` | the two classes, and what the episode calls them |
| `turns` | pictures with question and answer, the query last; `scored` where the loss counts |
| `answer`, `other` | the right name for the query, and the wrong one |
"""

from __future__ import annotations

import pyarrow as pa

__all__ = ["EPISODE", "PAIR"]

PAIR = pa.schema(
    [
        ("picture", pa.string()),
        ("image", pa.binary()),
        ("concept", pa.string()),
        ("name", pa.string()),
        ("keywords", pa.list_(pa.string())),
        ("category", pa.string()),
        ("subcategory", pa.string()),
        ("style", pa.string()),
        ("licence", pa.string()),
        ("source", pa.string()),
    ]
)

TURN = pa.struct(
    [
        ("picture", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("scored", pa.bool_()),
    ]
)

EPISODE = pa.schema(
    [
        ("episode", pa.int64()),
        ("task", pa.string()),
        ("shots", pa.int32()),
        ("concepts", pa.list_(pa.string())),
        ("names", pa.list_(pa.string())),
        ("turns", pa.list_(TURN)),
        ("answer", pa.string()),
        ("other", pa.string()),
    ]
)
