"""What depends on optional packages and their versions, and wrappers that refuse when a grid is read."""

from __future__ import annotations

from typing import Any

import pytest

from mergesec.errors import UsageError
from mergesec.planning import refs
from mergesec.planning.catalog import load_catalog


@pytest.mark.parametrize(
    ("found", "kept"), [("5.3.1", "5"), ("10.0", "10"), ("0.2.33", "0.2"), ("0.2.34.dev0", "0.2"), ("0", "0")]
)
def test_minor_versions_count_before_1_0_only(monkeypatch: pytest.MonkeyPatch, found: str, kept: str) -> None:
    monkeypatch.setattr(refs, "version", lambda name: found)
    assert refs._series("anything") == kept


def test_knots_refuses_rules_that_need_more_than_weights_when_a_grid_is_read() -> None:
    catalog = load_catalog()
    knots = catalog.get("merging", "knots")
    ref = refs.make_ref(knots, {"base_method": "magmax"}, "axes.merging", catalog)
    assert ref.inner[0].name == "magmax"
    with pytest.raises(UsageError, match="knots cannot wrap adamerging: it does not work on weights alone"):
        refs.make_ref(knots, {"base_method": "adamerging"}, "axes.merging", catalog)


def test_names_of_missing_packages_say_what_to_install(bench: Any) -> None:
    """The command runs in a process of its own, where a finder hides the package."""
    hider = bench.home / "sitecustomize.py"
    hider.write_text(
        "import importlib.util as u\nreal = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'fusion_bench' else real(name, *a)\n"
    )
    bench.environment["PYTHONPATH"] = str(bench.home)
    shown = bench("info", "fusionbench/gossip")
    assert shown.code == 2
    assert "pip install 'mergesec[fusionbench]'" in shown.err
    doctor = bench("doctor")
    assert "components need" in doctor.out
