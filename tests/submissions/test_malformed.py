"""Hostile and broken entries: a message that names the field, and exit code 2; nothing is executed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergesec.errors import UsageError
from mergesec.submissions.entry import FILE, read_entry
from mergesec.submissions.fresh import new_entry


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    new_entry("halfback", "defense", tmp_path)
    return tmp_path / "halfback"


def rewritten(old: str, new: str) -> Callable[[Path], None]:
    def change(entry: Path) -> None:
        text = (entry / FILE).read_text()
        assert old in text
        (entry / FILE).write_text(text.replace(old, new, 1))

    return change


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))])
TEXTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bomb": (lambda e: (e / FILE).write_text(BOMB), "more than 100000 values"),
    "deep": (lambda e: (e / FILE).write_text("a: " + "[" * 5000), "nested more than"),
    "object": (rewritten("contact: ''", "contact: !!python/object/apply:os.system [id]"), "not YAML"),
    "twice": (lambda e: (e / FILE).write_text((e / FILE).read_text() + "\nmethod: clp\n"), "is given twice"),
    "bytes": (lambda e: (e / FILE).write_bytes(b"\xff\xfe"), "not UTF-8"),
    "list": (lambda e: (e / FILE).write_text("- 1\n"), "not a mapping"),
    "unknown": (rewritten("licence:", "license:"), "unknown field; did you mean 'licence'?"),
    "kind": (rewritten("kind: defense", "kind: backbone"), "kind"),
    "long": (rewritten("contact: ''", f"contact: '{'a' * 300}'"), "contact"),
    "link": (rewritten("url: ''", "url: 'javascript:alert(1)'"), "paper.url"),
    "version": (rewritten("schema_version: 1", "schema_version: 2"), "schema_version"),
    "digest": (rewritten("digest: ''", "digest: XYZ"), "code.digest"),
    "above": (rewritten("- halfback.py", "- ../other.py"), "does not lie in the entry's folder"),
    "absolute": (rewritten("- halfback.py", "- /etc/passwd"), "does not lie in the entry's folder"),
    "absent": (rewritten("- halfback.py", "- fullback.py"), "no file 'fullback.py'"),
    "no code": (rewritten("- halfback.py", "- grid.yaml"), "is not Python"),
    "no paper": (rewritten("paper:", "papers:"), "papers: unknown field; did you mean 'paper'?"),
    "environment": (
        lambda e: (e / "grid.yaml").write_text("name: ${oc.env:HOME}\n"),
        "no ${...} and no settings of hydra",
    ),
    "search path": (
        lambda e: (e / "grid.yaml").write_text("hydra: {searchpath: ['file:///etc']}\n"),
        "no ${...} and no settings of hydra",
    ),
    "places": (
        lambda e: (e / "grid.yaml").write_text("suite: {experts: {micro/bars: /elsewhere/model}}\n"),
        "does not lie in the entry's folder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_a_malformed_entry_is_refused_by_field(name: str, fresh: Path) -> None:
    change, message = TEXTS[name]
    change(fresh)
    with pytest.raises(UsageError) as caught:
        read_entry(fresh)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_link_is_no_file_of_the_entry(fresh: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text((fresh / "halfback.py").read_text())
    (fresh / "halfback.py").unlink()
    (fresh / "halfback.py").symlink_to(tmp_path / "elsewhere.py")
    with pytest.raises(UsageError, match="is a link; an entry holds its files itself"):
        read_entry(fresh)


def test_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="FOLDER: no folder"):
        read_entry(tmp_path / "nothing")
    with pytest.raises(UsageError, match=rf"FOLDER: no file '{FILE}'"):
        read_entry(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("clp", "defense", "could be taken for 'clp'"),
        ("c1p", "defense", "could be taken for 'clp'"),
        ("Half", "defense", "small letters"),
        ("../up", "defense", "small letters"),
        ("half", "defence", "did you mean 'defense'?"),
    ],
)
def test_a_new_entry_needs_a_name_and_a_kind(name: str, kind: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        new_entry(name, kind, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_new_entry_takes_no_folders_place(fresh: Path) -> None:
    with pytest.raises(UsageError, match="is there already"):
        new_entry("halfback", "defense", fresh.parent)


def test_exit_codes_of_refused_and_malformed(fresh: Path, bench: Any) -> None:
    ran = bench("submit", "check", str(fresh), "--no-rerun")
    assert ran.code == 1
    assert "code.digest is empty; bench submit pack fills it" in ran.out
    rewritten("kind: defense", "kind: 7")(fresh)
    ran = bench("submit", "check", str(fresh))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: submission.yaml: kind: ")
    assert "Traceback" not in ran.err
