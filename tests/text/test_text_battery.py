"""The battery looks at text attacks as closely as at image attacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergesec.conformance.battery import check_file
from mergesec.planning.catalog import load_catalog

BAD = {
    "nothing": ("return list(inputs)", "changes nothing"),
    "mutates": ("inputs[0] = 'x'; return ['x ' + t for t in inputs]", "changed its inputs in place"),
    "fewer": ("return ['x']", "inputs for"),
    "draws": ("import random; return [f'{random.random()} {t}' for t in inputs]", "second time"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", BAD)
def test_battery_catches(fault: str, tmp_path: Path) -> None:
    body, expected = BAD[fault]
    path = tmp_path / "bad.py"
    path.write_text(f"""import torch
from mergesec.contracts import Attack
CARD = {{
    "name": "bad", "kind": "attack", "class": "Bad", "version": "1", "title": "bad", "summary": "bad",
    "threat": "backdoor", "hooks": ["poison"], "modalities": ["text"], "seeded": True,
}}
class Bad(Attack):
    def trigger(self, ctx):
        return {{"x": torch.zeros(1)}}
    def apply(self, trigger, inputs):
        {body}
    def poison(self, ctx):
        return ctx.fit()
""")
    wrong = [c for _, c in check_file(path, load_catalog()) if c.passed is False]
    assert any(expected in f"{c.name} {c.message}" for c in wrong), wrong
