"""Why a sample is left out: one wording for each fault, so that counts add up.

Faults of the input, which count against `corpus.max_skipped_share`, and choices of the run, which do not.
"""

from __future__ import annotations

__all__ = ["CHOICES"]

# Faults of files and records.
BROKEN_FILE = "broken file"
BROKEN_METADATA = "broken metadata"
INCOMPLETE_METADATA = "incomplete metadata"
NO_PICTURE = "no picture"
SEVERAL_PICTURES = "several pictures"
NO_TEXT = "no caption"
REPEATED_KEY = "repeated key"
SCATTERED_KEY = "members of one key lie apart"
MISSING_FILE = "missing picture file"
FORGED_PATH = "path leads out of its folder"

# Faults of the bytes of a picture.
EMPTY_PICTURE = "empty picture"
WEB_PAGE = "web page instead of a picture"
NOT_A_PICTURE = "not a picture"
UNSUPPORTED_FORMAT = "unsupported picture format"
TRUNCATED_PICTURE = "truncated picture"
CORRUPT_PICTURE = "corrupt picture"
TOO_MANY_PIXELS = "too many pixels"
TOO_MANY_BYTES = "too many bytes"

# Faults of loading by URL.
URL_REFUSED = "url refused"
URL_FAILED = "url failed"
ROBOTS = "robots.txt forbids it"
OPTED_OUT = "owner opted out"

# Choices of the run.
PLACEHOLDER = "placeholder picture"
REPEATED_PICTURE = "repeated picture"
TWIN_OF_HELD_OUT = "twin of a held-out picture"
UNMATCHED_PICTURE = "picture without a matching text"
NO_CONCEPT = "no concept"
RARE_CONCEPT = "rare concept"
NO_GROUP = "nothing to group it by"

# Episodes that cannot be drawn; the name of the task stands before. Braces take a number of pictures.
TOO_FEW_CONCEPTS = "fewer than two concepts have {} pictures"
TOO_FEW_NAMED_CONCEPTS = "fewer than two concepts have a name and {} pictures"
NO_NEIGHBOUR = "no neighbour has {} pictures"
NAMES_CLASH = "one name lies inside the other"
LOOK_ALIKES = "too few pictures unlike the one asked about"
NO_NAMED_CONCEPT = "no concept has a name and a picture"
NO_DOCUMENT = "no document has two pictures"
TOO_FEW_TEXTS = "document with fewer than two texts"
NO_TASK = "no task has {} pictures"
NO_CONVERSATION = "task without a conversation"
NO_KIND = "no concept has a kind"
TOO_FEW_KINDS = "fewer than {} concepts of its kind and of others"
NOTHING_TOLD = "task with fewer than {} texts"

CHOICES = frozenset(
    {
        PLACEHOLDER,
        REPEATED_PICTURE,
        TWIN_OF_HELD_OUT,
        UNMATCHED_PICTURE,
        NO_CONCEPT,
        RARE_CONCEPT,
        NO_GROUP,
    }
)
