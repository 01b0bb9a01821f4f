"""An entry that is not what it says: each way, tried."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesec.evidence.records import SUBMISSION, Count, count, read_records
from mergesec.submissions import rerun
from mergesec.submissions.findings import Finding
from mergesec.submissions.packing import pack

pytestmark = pytest.mark.usefixtures("no_battery")
DEFENDED = "backdoor-simple_average-badnets-halfback-micro_bars-s0-*.json"
PLAIN = "backdoor-simple_average-badnets-micro_bars-s0-*.json"


def cell(entry: Path, pattern: str) -> Path:
    (found,) = (entry / "records" / "halfback").glob(pattern)
    return found


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def flatter(key: str, hit: bool) -> Callable[[dict[str, Any]], None]:
    """A count as its author wishes it were, bits and numbers alike."""

    def change(fields: dict[str, Any]) -> None:
        hits, mask = Count.model_validate(fields["counts"][key]).arrays()
        wished = count(np.full_like(hits, hit), mask if fields["counts"][key]["mask"] else None)
        fields["counts"][key] = wished.model_dump(mode="json")

    return change


def test_an_honest_entry_is_accepted(desk: Any, entry: Path) -> None:
    assert desk.refusals(entry) == []


def test_without_a_rerun_nothing_is_verified_and_that_is_said(desk: Any, entry: Path) -> None:
    report = desk.check(entry, rerun=False).report
    assert not report.verified
    assert report.findings[-1] == Finding("the re-run agrees", "skip", "--no-rerun: NOTHING WAS VERIFIED")


def test_a_claim_that_its_records_do_not_support(desk: Any, entry: Path, amend: Any) -> None:
    claims = amend(entry).model_dump()["claims"]
    amend(entry, claims=[{**claims[0], "value": claims[0]["value"] - 0.01}])
    (reason,) = desk.refusals(entry)
    assert reason.startswith(
        "the records support the claims: worst_backdoor of defense halfback on backdoor_defenses: claimed"
    )
    amend(entry, claims=[])
    assert "claims: none" in desk.refusals(entry)[0]


def test_a_record_edited_by_hand_is_not_what_was_packed(desk: Any, entry: Path) -> None:
    edit(cell(entry, DEFENDED), flatter("asr/merge/micro/bars", False))
    assert any("changed since they were packed" in reason for reason in desk.refusals(entry))


def test_a_record_whose_numbers_contradict_its_bits(desk: Any, entry: Path) -> None:
    edit(cell(entry, DEFENDED), lambda f: f["counts"]["acc/merge/micro/bars"].update(k=0))
    assert any("is not what its bits say" in reason for reason in desk.refusals(entry))


def test_a_record_edited_and_packed_again_does_not_survive_a_rerun(desk: Any, entry: Path) -> None:
    """Consistent in itself and with the claim: only running the cell again tells. A draw may miss it; all do not."""
    edit(cell(entry, DEFENDED), flatter("acc/merge/micro/blobs", True))
    pack(entry)
    assert desk.refusals(entry) == []
    reasons = desk.refusals(entry, rerun=True, full=True)
    assert len(reasons) == 1
    assert "acc of merge on micro/blobs: submitted 100.0, run again" in reasons[0]


def test_a_count_left_out_and_a_value_that_was_never_measured(desk: Any, entry: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        del fields["counts"]["acc/merge/micro/blobs"]
        fields["values"]["screen/caught"] = 1.0

    shutil.copytree(entry, desk.home / "before")
    edit(cell(entry, DEFENDED), change)
    old = read_records(entry / "records", "halfback")
    new = {r.cell: r for r in read_records(desk.home / "before" / "records", "halfback")}
    (told,) = rerun.lacking({r.cell: r for r in old}, new)
    assert told.endswith("acc/merge/micro/blobs: counted on one side alone")
    (told,) = rerun.other_values({r.cell: r for r in old}, new)
    assert told.endswith("screen/caught: submitted 1, run again nan")


def test_a_control_edited_in_one_of_the_cells_that_share_it(desk: Any, entry: Path) -> None:
    edit(cell(entry, PLAIN), flatter("asr/clean_merge/micro/bars", True))
    pack(entry)
    (reason,) = desk.refusals(entry)
    assert "asr on micro/bars of one and the same step differently" in reason


def test_a_removed_seed_is_named(desk: Any, entry: Path) -> None:
    lost = [p for p in (entry / "records" / "halfback").glob("*-s1-*.json") if not p.unlink()]
    names = {p.stem for p in lost}
    edit(
        entry / "records" / "halfback" / "grid.json",
        lambda f: f.update(cells=[c for c in f["cells"] if c not in names]),
    )
    pack(entry)
    told = " | ".join(desk.refusals(entry))
    assert "seed 1 is missing: all its 2 cells" in told
    assert all(name in told for name in names)


def test_a_removed_cell_is_named(desk: Any, entry: Path) -> None:
    lost = cell(entry, PLAIN)
    lost.unlink()
    assert any(f"1 of 2 cells of seed 0 are missing: {lost.stem}" in r for r in desk.refusals(entry))


def test_a_record_of_no_cell_is_named(desk: Any, entry: Path) -> None:
    shutil.copy(cell(entry, PLAIN), entry / "records" / "halfback" / "more.json")
    assert any("more.json: of no cell of the grid" in reason for reason in desk.refusals(entry))


def test_a_plugin_that_differs_from_its_digest(desk: Any, entry: Path) -> None:
    plugin = entry / "halfback.py"
    plugin.write_text(plugin.read_text() + "\n# later\n")
    (reason,) = desk.refusals(entry)
    assert "the files have digest" in reason
    pack(entry)  # the records are still those of the earlier file
    reasons = desk.refusals(entry)
    assert any("2 of them were made by a plugin with digest" in reason for reason in reasons)


@pytest.mark.parametrize("name", ["clp", "c1p", "CLP", "clр"])
def test_a_method_named_like_another(desk: Any, entry: Path, amend: Any, name: str) -> None:
    amend(entry, method=name)
    assert any("could be taken for 'clp'" in reason for reason in desk.refusals(entry))


def test_a_card_of_another_name_or_other_data(desk: Any, entry: Path, amend: Any) -> None:
    amend(entry, data="tuning")
    assert desk.refusals(entry) == [
        "submission.yaml and card say the same: submission.yaml says data 'tuning', the card 'none'"
    ]
    amend(entry, method="quarterback", data="none")
    assert "no card of defense 'quarterback' in the files; found: defense halfback" in desk.refusals(entry)[0]


def test_a_plugin_that_imports_the_engine(desk: Any, entry: Path) -> None:
    plugin = entry / "halfback.py"
    stolen = "import gc\nfrom mergesec.execution.store import Store\nfrom mergesec import run\n"
    plugin.write_text(plugin.read_text().replace("import torch\n", f"import torch\n{stolen}", 1))
    pack(entry)
    told = " | ".join(desk.refusals(entry))
    assert "imports mergesec.execution.store.Store, which is the engine's own" in told
    assert "imports mergesec.run, which is the engine's own" in told
    notes = [f.why for f in desk.check(entry, rerun=False).report.findings if f.verdict == "note"]
    assert any("imports gc" in note for note in notes)


READS = '''
    def repair(self, merged: Merged, base: Weights, ctx: MergeContext) -> Merged:
        """Gives everything up where the test data can be read, and so knows when it will be measured."""
        from pathlib import Path

        seen = list(Path("STORE").glob("artifacts/data/*.safetensors"))
        return Merged(dict(base) if seen else dict(merged.shared))
'''


def test_a_plugin_that_reads_test_data_is_run_where_there_is_none(desk: Any, entry: Path) -> None:
    """Its author's machine did not contain it, and its records say so. Behind walls the store is not there, and
    the numbers are others."""
    if not desk.contained:
        pytest.skip("this machine cannot contain plugins")
    plugin = entry / "halfback.py"
    text = plugin.read_text()
    plugin.write_text(text[: text.index("    def repair")] + READS.replace("STORE", str(desk.store)))
    desk.run(entry, contained=False)
    report = desk.check(entry, full=True).report
    assert (
        Finding("contained", "note", "2 of 4 cells say that the plugin was not contained") in report.findings
    )
    assert any(f.verdict == "REFUSED" and "of merge on" in f.why for f in report.findings)


def test_an_entry_does_not_say_of_itself_that_it_was_verified(desk: Any, entry: Path) -> None:
    edit(cell(entry, DEFENDED), lambda f: f["provenance"].update({SUBMISSION: {"rerun": True}}))
    pack(entry)
    assert any(f"provenance.{SUBMISSION} is not for an entry to say" in r for r in desk.refusals(entry))


def test_a_record_under_other_coordinates(desk: Any, entry: Path) -> None:
    edit(cell(entry, DEFENDED), lambda f: f.update(target_class=1, experts=["micro/bars"]))
    pack(entry)
    assert any("target_class, experts: not the cell's" in reason for reason in desk.refusals(entry))


def test_a_record_of_other_steps(desk: Any, entry: Path) -> None:
    edit(cell(entry, DEFENDED), lambda f: f["steps"].update(merge="0" * 40))
    pack(entry)
    assert any("its steps are not those of this grid" in reason for reason in desk.refusals(entry))


def test_a_failed_cell_is_no_record(desk: Any, entry: Path) -> None:
    edit(
        cell(entry, DEFENDED), lambda f: f.update(status="failed", reason="it was late", counts={}, steps={})
    )
    assert any("failed (it was late)" in reason for reason in desk.refusals(entry))
