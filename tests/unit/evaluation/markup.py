"""What a browser would make of a page, as far as tests ask."""

from __future__ import annotations

from html.parser import HTMLParser

__all__ = ["Element", "parse", "told"]

Element = tuple[str, dict[str, str | None]]


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.words: list[str] = []
        self._inside: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside != "style":
            self.words.append(data)


def parse(page: str) -> list[Element]:
    """The elements of a page, each with its attributes."""
    parser = _Parser()
    parser.feed(page)
    return parser.elements


def told(page: str) -> str:
    """The text that a page shows."""
    parser = _Parser()
    parser.feed(page)
    return "\n".join(parser.words)
