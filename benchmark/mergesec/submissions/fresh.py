"""A new entry: the smallest plugin of its kind, its test, its grid and its ``submission.yaml``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergesec.errors import UsageError, nearest
from mergesec.files import brief, check_writable, write_atomic
from mergesec.planning.catalog import load_catalog
from mergesec.submissions.entry import FILE, KINDS, Claim, Code, Paper, Submission
from mergesec.submissions.method import WORLDS
from mergesec.submissions.names import taken_for
from mergesec.submissions.packing import written

TEMPLATES = Path(__file__).parent / "templates"
_CLAIMS: Mapping[str, Mapping[str, Any]] = {
    "defense": {"board": "backdoor_defenses", "row": {"defense": "fresh"}, "column": "worst_backdoor"},
    "attack": {"board": "protection_cells", "row": {"attack": "fresh"}, "column": "MMP_attacked"},
    "merging": {"board": "clean", "row": {"method": "fresh"}, "column": "accuracy"},
    "task": {"board": "clean", "row": {"method": "simple_average"}, "column": "accuracy"},
}
"""The number that a new entry stands for, until its author names others."""
_KNOWS = {
    "defense": "the base and the merged weights",
    "attack": "the published weights",
    "merging": "",
    "task": "",
}
"""What the templates' cards say."""


def new_entry(name: str, kind: str, folder: Path) -> list[Path]:
    """Write the entry into ``folder/name``; UsageError for a name that is taken, or looks as if it were."""
    if kind not in KINDS:
        raise UsageError("--kind", f"{kind!r}{nearest(kind, KINDS)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]{1,39}", name):
        raise UsageError("NAME", f"{brief(name)!r}: small letters, digits and '_', 2 to 40, a letter first")
    known = {"none", "fresh", *(entry.card.name for entry in load_catalog(WORLDS))}
    if other := taken_for(name, known):
        raise UsageError("NAME", f"{name!r} could be taken for {other!r}, which is registered")
    home = folder / name
    if home.exists():
        raise UsageError("NAME", f"{str(home)!r} is there already")
    check_writable(home, "NAME")
    made = []
    for source in sorted((TEMPLATES / kind).iterdir()):
        if source.suffix in (".py", ".yaml") and source.name != "__init__.py":
            target = home / source.name.replace("check_plugin", f"test_{name}").replace("plugin", name)
            write_atomic(target, _named(source.read_text(encoding="utf-8"), name).encode())
            made.append(target)
    write_atomic(home / FILE, written(_submission(name, kind)).encode())
    return [*made, home / FILE]


def _named(text: str, name: str) -> str:
    """A template with the entry's name for its own."""
    title = "".join(part.capitalize() for part in name.split("_"))
    text = text.replace('"title": "Fresh"', f'"title": "{title}"').replace("plugin.py", f"{name}.py")
    return re.sub(r"\bfresh\b", name, re.sub(r"\bFresh\b", title, text))


def _submission(name: str, kind: str) -> Submission:
    claim = _CLAIMS[kind]
    row = {k: name if v == "fresh" else v for k, v in claim["row"].items()}
    return Submission(
        method=name,
        kind=kind,  # type: ignore[arg-type]  # one of KINDS
        paper=Paper(title=f"(the paper of {name}, or: unpublished)"),
        licence="Apache-2.0",
        knowledge=_KNOWS[kind],
        code=Code(files=[f"{name}.py"]),
        claims=[Claim(board=claim["board"], row=row, column=claim["column"])],
    )
