"""Packed entries on the micro world, made once, and checks of them in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergesec.execution.guests.containment import survey
from mergesec.submissions import walled
from mergesec.submissions.check import Asked, Checked, check
from mergesec.submissions.entry import FILE, Submission, read_submission
from mergesec.submissions.fresh import new_entry
from mergesec.submissions.packing import pack, run_entry, written
from mergesec.submissions.rerun import Manner


class Silent:
    """A reporter that says nothing, whatever it is told."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


class Desk:
    """An author's and a maintainer's hands: one store, one folder of entries."""

    def __init__(self, home: Path) -> None:
        self.home, self.store = home, home / "store"
        self.contained = not survey().obstacle

    def new(self, name: str, kind: str) -> Path:
        new_entry(name, kind, self.home)
        return self.home / name

    def manner(self, contained: bool | None = None) -> Manner:
        return Manner(self.contained if contained is None else contained, "cpu", 1)

    def run(self, entry: Path, contained: bool | None = None) -> None:
        """Run the entry's grid and pack it."""
        done = run_entry(entry, Asked(store=self.store), self.manner(contained), Silent())
        assert [r.reason for r in done.records if r.status != "done"] == []
        pack(entry)

    def check(self, entry: Path, **asked: Any) -> Checked:
        return check(entry, Asked(store=self.store, **asked), self.manner(), Silent())

    def refusals(self, entry: Path, **asked: Any) -> list[str]:
        """Reasons, without a re-run unless it is asked for."""
        found = self.check(entry, **{"rerun": False, **asked}).report
        return [f"{f.check}: {f.why}" for f in found.findings if f.verdict == "REFUSED"]


def amend(entry: Path, **changes: Any) -> Submission:
    """Change fields of ``submission.yaml``; those of ``code`` by ``code__NAME``."""
    fields = read_submission(entry / FILE).model_dump()
    for name, value in changes.items():
        inside, _, rest = name.partition("__")
        (fields[inside] if rest else fields)[rest or inside] = value
    submission = Submission.model_validate(fields)
    (entry / FILE).write_text(written(submission), encoding="utf-8")
    return submission


@pytest.fixture(scope="session", name="amend")
def _amend() -> Callable[..., Submission]:
    return amend


@pytest.fixture(scope="session")
def desk_class() -> type[Desk]:
    return Desk


@pytest.fixture(scope="session")
def _packed(once: Callable[..., Path]) -> Path:
    """Two seeds, an undefended merge and a defended one: four cells."""

    def make(home: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MERGESEC_CACHE", str(home / "store"))
            desk = Desk(home)
            entry = desk.new("halfback", "defense")
            grid = yaml.safe_load((entry / "grid.yaml").read_text())
            (entry / "grid.yaml").write_text(yaml.safe_dump({**grid, "seeds": [0, 1]}))
            desk.run(entry)

    return once("packed", make)


@pytest.fixture
def desk(_packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk of one's own with the packed entry ``halfback`` on it, and the steps of its run in the store."""
    home = tmp_path / "desk"
    shutil.copytree(_packed, home)
    monkeypatch.setenv("MERGESEC_CACHE", str(home / "store"))
    return Desk(home)


@pytest.fixture
def entry(desk: Desk) -> Path:
    return desk.home / "halfback"


@pytest.fixture
def no_battery(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what comes after it: the battery has tests of its own."""
    monkeypatch.setattr(walled, "battery", lambda *_: [])
