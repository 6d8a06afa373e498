"""An HTML page as a test looks at it: its tables by caption, its resources, and whatever could run."""

from __future__ import annotations

from html.parser import HTMLParser

_VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Raises on tags that do not match: what escapes its place in a page shows here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        """Rows of cells, header first, by caption."""
        self.resources: list[str] = []
        """What `src`, `href` and the like name."""
        self.active: list[str] = []
        """Scripts, and attributes that run."""
        self.texts: dict[str, list[str]] = {}
        """By tag what directly stands in it."""
        self.ids: list[str] = []
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.resources += [given[key] or "" for key in ("src", "href", "srcset", "action", "data", "poster", "xlink:href") if key in given]
        self.active += [tag] if tag in ("script", "iframe", "object", "embed", "form", "base") else []
        self.active += [f"{tag} {key}" for key in given if key.startswith("on")]
        self.ids += [given["id"] or ""] if "id" in given else []
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        if tag not in _VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> at {self.getpos()} closes another tag"
        if tag == "table":
            assert self._caption not in self.tables, f"two tables are called {self._caption!r}"
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if not self._open:
            return
        self.texts[self._open[-1]][-1] += data
        if "caption" in self._open:
            self._caption += data
        elif ("td" in self._open or "th" in self._open) and self._rows:
            self._rows[-1][-1] = f"{self._rows[-1][-1]} {data}".strip() if data.strip() else self._rows[-1][-1]
