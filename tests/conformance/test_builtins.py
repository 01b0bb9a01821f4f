"""Every built-in goes through the battery that a stranger's plugin goes through."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mergesec.conformance.battery import MICRO, check_component
from mergesec.planning.catalog import Catalog, Entry, load_catalog

CATALOG: Catalog = load_catalog([MICRO])


def _sort(entry: Entry) -> tuple[str, str]:
    return entry.card.kind, entry.card.threat


def _tried() -> Iterator[Any]:
    """Every component; of each kind and threat the plainest is quick, the others are slow."""
    plainest = {_sort(e): e for e in sorted(CATALOG, key=lambda e: -len(e.card.parameters))}
    for entry in CATALOG:
        marks = [] if plainest[_sort(entry)] is entry else [pytest.mark.slow]
        yield pytest.param(entry, id=f"{entry.card.kind}-{entry.card.name}", marks=marks)


@pytest.mark.usefixtures("no_forced_collections")
@pytest.mark.parametrize("entry", _tried())
def test_builtin_conforms(entry: Entry) -> None:
    checks = check_component(entry, CATALOG)
    assert checks
    wrong = [f"{c.name}: {c.message}" for c in checks if c.passed is False]
    assert not wrong


BAD = {
    "draws": ("return {k: v + 1e-6 * torch.rand(v.shape, generator=ctx.generator()) if v.is_floating_point()"
              " else v for k, v in published.items()}", "seeded"),
    "mutates": ("published['stem.bias'].add_(1); return dict(published)", "in place"),
    "nan": ("return {k: v * float('nan') if v.is_floating_point() else v for k, v in published.items()}", "non-finite"),
    "keys": ("return {k: v for k, v in published.items() if k != 'stem.bias'}", "stem.bias"),
    "shape": ("return {**published, 'stem.bias': published['stem.bias'][:-1]}", "stem.bias"),
    "raises": ("raise RuntimeError('no idea')", "no idea"),
    "nothing": ("return None", "NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_battery_catches(fault: str, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    body, expected = BAD[fault]
    path = tmp_path / "bad.py"
    path.write_text(f"""import torch
from mergesec.contracts import Attack
CARD = {{
    "name": "bad", "kind": "attack", "class": "Bad", "version": "1", "title": "bad", "summary": "bad",
    "threat": "protection", "hooks": ["recover"],
}}
class Bad(Attack):
    def recover(self, published, ctx):
        {body}
""")
    from mergesec.conformance.battery import check_file

    found = [c for _, c in check_file(path, load_catalog())]
    wrong = [c for c in found if c.passed is False]
    assert wrong
    assert any(expected in f"{c.name} {c.message}" for c in wrong), wrong
