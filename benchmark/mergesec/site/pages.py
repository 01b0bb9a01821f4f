"""Pages from templates: everything in them is escaped, and none has a script or style of its own."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from mergesec import __version__
from mergesec.errors import UsageError
from mergesec.files import plain
from mergesec.site.boards import data_of
from mergesec.site.methods import COLUMN, SCALES
from mergesec.site.names import cell_link, cells_link, link, slug, web

TITLES = {"clean": "Merging", "protection": "Protection", "backdoor": "Backdoors"}
"""What readers call each threat model."""
KINDS = {"merging": "Merge methods", "attack": "Attacks", "defense": "Defenses"}


class Pages:
    """The templates; UsageError if Jinja2 is not installed."""

    def __init__(self) -> None:
        try:
            from jinja2 import Environment, PackageLoader, StrictUndefined
        except ImportError:
            raise UsageError("site", "needs Jinja2; install it with: pip install 'mergesec[site]'") from None
        self._templates = Environment(
            loader=PackageLoader("mergesec.site"), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True, finalize=_shown,
        )  # fmt: skip
        self._templates.globals |= {
            "titles": TITLES, "kinds": KINDS, "columns": COLUMN, "scales": SCALES, "version": __version__,
            "link": link, "cell_link": cell_link, "cells_link": cells_link, "slug": slug, "web": web,
            "data_of": data_of, "quote": quote, "weight": weight, "percent": percent, "number": number,
        }  # fmt: skip

    def render(self, template: str, depth: int, **told: Any) -> bytes:
        """A page that lies ``depth`` folders below the start page."""
        found = self._templates.get_template(f"{template}.html.j2")
        return found.render(root="../" * depth, page=template, **told).encode("utf-8", "replace")


def _shown(value: Any) -> Any:
    """What a template puts into a page: text without control characters or reversed writing."""
    return plain_lines(value) if type(value) is str else value


def plain_lines(text: str) -> str:
    """``plain``, its lines kept."""
    return "\n".join(plain(line) for line in text.split("\n"))


def weight(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{max(1, round(size / 1e3))} kB"


def percent(value: float) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}"


def number(value: Any) -> str:
    """A number in three digits."""
    return f"{float(f'{value:.3g}'):g}" if isinstance(value, float) else str(value)
