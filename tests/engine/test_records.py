"""Records: refused when they contradict themselves, never lost, and nothing stands in for what was measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergesec.errors import UsageError
from mergesec.evidence.records import Record, read_records
from mergesec.execution.store import Store


def _files(bench: Any) -> dict[str, dict[str, Any]]:
    """A run's records by cell."""
    home = bench.results / "records" / "whole"
    return {p.stem: json.loads(p.read_text()) for p in home.glob("*.json") if p.stem != "grid"}


def _one(bench: Any, start: str) -> Path:
    home: Path = bench.results / "records" / "whole"
    return next(p for p in sorted(home.glob(f"{start}*.json")))


def _mutated(record: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed: dict[str, Any] = json.loads(json.dumps(record))
    *way, last = path.split(".")
    place = changed
    for part in way:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return changed


COUNT = "counts.acc/clean_merge/micro/bars"
WRONG = [
    ("schema_version", 1000, "schema_version"), ("status", "| 99.9 |", "status"), ("threat", "both", "threat"),
    ("protocol", "x", "protocol"), ("protected", 0, "protected"), ("target_class", -1, "target_class"),
    ("seed", 7, "is not the name of its content"), ("subject", "micro/blobs", "is not the name of its content"),
    (f"{COUNT}.k", 1_000_000, "is not what its bits say"), (f"{COUNT}.k", -1, "greater than or equal to 0"),
    (f"{COUNT}.n", 1, "is not what its bits say"), (f"{COUNT}.total", 7, "bytes of bits"),
    (f"{COUNT}.hits", "!!", "base64"), (f"{COUNT}.hits", "AAAA", "bytes of bits"),
    ("counts", {}, "steps and counts disagree"), ("counts.nameless", {"k": 0, "n": 0, "total": 0, "hits": "", "mask": ""}, "name no role"), (COUNT.replace("/micro/bars", "/x"), 1, "counts"),
    ("steps", {}, "steps and counts disagree"), ("cost.base.made_peak_mb", None, "lacks seconds or peak_mb"),
    ("cost.base.seconds", -1.0, "is not seconds"), ("grid", "other", "holds cell"), ("extra", 1, "extra"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), WRONG, ids=[f"{p}={v!r}"[:60] for p, v, _ in WRONG])
def test_a_record_that_contradicts_itself_is_refused(
    copied: Any, path: str, value: Any, message: str
) -> None:
    place = _one(copied, "backdoor-simple_average-badnets-clp")
    place.write_text(json.dumps(_mutated(json.loads(place.read_text()), path, value)))
    with pytest.raises(UsageError, match=r"backdoor-simple_average-badnets-clp") as caught:
        read_records(copied.results / "records", "whole")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "\x00", "[" * 100_000, '{"cell": NaN}'],
)
def test_what_is_no_record_is_refused_by_its_file(copied: Any, text: str) -> None:
    place = _one(copied, "clean-ties")
    place.write_text(text)
    with pytest.raises(UsageError, match=r"clean-ties.*not a record"):
        read_records(copied.results / "records", "whole")


@pytest.mark.parametrize("name", ["../away", "a/b", "", "x" * 200, ".", "a\nb"])
def test_a_grid_is_a_plain_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not a grid's name"):
        read_records(tmp_path, name)


def test_records_of_before_components_still_load(copied: Any) -> None:
    before = read_records(copied.results / "records", "whole")
    for path in (copied.results / "records" / "whole").glob("*-*.json"):
        path.write_text(json.dumps(_mutated(json.loads(path.read_text()), "components", None)))
    after = read_records(copied.results / "records", "whole")
    assert [r.model_copy(update={"components": {}}) for r in before] == after
    assert all(r.components["merging"].name == r.merging.partition("(")[0] for r in before)


# --------------------------------------------------------------------------- never lost


def test_a_failing_run_on_an_empty_store_leaves_done_records(copied: Any, whole: Any) -> None:
    """The store is on another machine, and the data cannot be made here: nothing done is forgotten."""
    before, boards = _files(copied), copied.boards("whole")
    shutil.rmtree(copied.store)
    grid = copied.grid("whole", **whole)
    ran = copied.run(grid, "--step-timeout", "0.001")
    assert ran.code == 1
    assert "0 of 18 cells done" in ran.out
    assert "18 cells stand as an earlier run left them" in ran.err
    assert _files(copied) == before
    assert copied.boards("whole") == boards
    assert (
        "18 cells are as an earlier run left them"
        in (copied.results / "leaderboards" / "whole" / "boards.md").read_text()
    )


def test_a_record_that_was_not_done_is_replaced_by_what_is_known_now(copied: Any, whole: Any) -> None:
    place = _one(copied, "clean-ties")
    record = Record.model_validate_json(place.read_bytes())
    lost = record.model_copy(update={"status": "missing", "reason": "not run yet", "counts": {}, "cost": {}})
    place.write_text(lost.model_dump_json())
    ran = copied.run(copied.grid("whole", **whole))
    assert ran.code == 0, ran.err
    assert json.loads(place.read_text())["status"] == "done"


# --------------------------------------------------------------------------- nothing stands in


@pytest.mark.parametrize(
    "kinds", [("merge",), ("repair", "poison", "trigger", "data", "protect")], ids=" ".join
)
def test_what_was_cleared_is_made_again_and_tells_the_same(
    copied: Any, whole: Any, kinds: tuple[str, ...], commits: Callable[[Path], dict[str, int]]
) -> None:
    before = {cell: (r["counts"], r["facts"], _rows(r)) for cell, r in _files(copied).items()}
    stored = commits(copied.store)
    others = {k: when for k, when in stored.items() if k.partition("/")[0] not in kinds}
    for kind in kinds:
        shutil.rmtree(copied.store / "artifacts" / kind)
    ran = copied.run(copied.grid("whole", **whole))
    assert ran.code == 0, ran.err
    after = {cell: (r["counts"], r["facts"], _rows(r)) for cell, r in _files(copied).items()}
    assert after == before
    again = commits(copied.store)
    assert again.keys() == stored.keys()
    assert others.items() <= again.items()  # and nothing else was made again


def _rows(record: dict[str, Any]) -> dict[str, float]:
    return {side: cost["rows"] for side, cost in record["cost"].items() if "rows" in cost}


def test_changed_facts_are_found_and_made_again(copied: Any, whole: Any) -> None:
    before = {cell: r["facts"] for cell, r in _files(copied).items()}
    store, changed = Store(copied.store), []
    for kind in ("merge", "repair", "poison", "data"):
        for path in (copied.store / "artifacts" / kind).glob("*.json"):
            path.write_text(path.read_text().replace('"seconds": ', '"seconds": 9'))
            changed.append((kind, path.stem))
    ran = copied.run(copied.grid("whole", **whole))
    assert ran.code == 0, ran.err
    assert {cell: r["facts"] for cell, r in _files(copied).items()} == before
    assert changed
    assert all(store.meta(kind, key)["info"] for kind, key in changed)  # each verifies again
