"""Names as parts of files and of links: whatever a record says, a name is a plain one and no link is a script."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from urllib.parse import quote, urlencode


def slug(name: str) -> str:
    """A file name for ``name``: itself if it is plain, else what is plain of it and a digest. No two that differ
    in more than case are alike, and those that differ in case are not either."""
    if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,79}", name):
        return name
    kept = re.sub(r"[^a-z0-9_-]+", "_", name.lower())[:40].strip("_-")
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{kept}-{digest}" if kept else digest


def link(page: str, **chosen: str) -> str:
    """A page of the site with what it shows at first."""
    told = {name.replace("__", "."): value for name, value in chosen.items() if value}
    return f"{page}#{urlencode(told, quote_via=quote)}" if told else page


def cell_link(grid: str, cell: str) -> str:
    """The page of a cell."""
    return f"cell.html#{quote(grid, safe='')}/{quote(cell, safe='')}"


def cells_link(grid: str, chosen: Mapping[str, str]) -> str:
    """The list of a grid's cells, filtered."""
    return link(f"cells/{slug(grid)}.html", **{f"f__{name}": value for name, value in chosen.items()})


def web(url: str) -> str:
    """A link to elsewhere, if it is one; else nothing."""
    return url if re.match(r"https?://[^\s]+$", url) else ""
