"""bench scan: what is measured of a task vector, what is said of it, and how its error rates come about."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mergesec
from mergesec.anatomy import Anatomy
from mergesec.cli.main import main
from mergesec.errors import UsageError
from mergesec.planning.catalog import load_catalog
from mergesec.scanning.measures import measure
from mergesec.scanning.realigning import anatomy_of, coupled, laid
from mergesec.scanning.reference import (
    Rate,
    Reference,
    Specimen,
    read_reference,
    reference_of,
    shipped,
    threshold,
)
from mergesec.surgery import change_heads, reorder_hidden
from mergesec.weights import digest_weights

BASE = "mini/vit"
SIZE = 1e-3


@pytest.fixture(scope="module")
def network() -> tuple[dict[str, Tensor], Anatomy]:
    entry = load_catalog().get("backbone", BASE)
    backbone = entry.create({})
    return dict(backbone.base_weights()), backbone.anatomy()


def tuned(base: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """A stand-in for an expert: the base and a little noise everywhere."""
    drawn = torch.Generator().manual_seed(seed)
    return {n: t + SIZE * torch.randn(t.shape, generator=drawn) for n, t in base.items()}


def hidden(base: dict[str, Tensor], anatomy: Anatomy, expert: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function with units in reverse order and query and key heads scaled by up to 50."""
    for block in anatomy.blocks:
        expert = reorder_hidden(expert, block.mlp, torch.arange(block.mlp.hidden - 1, -1, -1))
        heads, size = block.attention.heads, block.attention.head_dim
        mix = torch.diag(torch.linspace(1.0, 50.0, size, dtype=torch.float64)).expand(heads, size, size)
        same = torch.eye(size, dtype=torch.float64).expand(heads, size, size)
        expert = change_heads(
            expert, block.attention, query=mix, key=torch.linalg.inv(mix), value=same, output=same
        )
    return expert


# --------------------------------------------------------------------------- measures


def test_lengths_are_those_of_the_whole_task_vector(network: tuple[dict[str, Tensor], Anatomy]) -> None:
    base, anatomy = network
    expert = tuned(base)
    found = measure(base, expert, anatomy, None)
    change = sum(float((expert[n].double() - t.double()).square().sum()) for n, t in base.items())
    size = sum(float(t.double().square().sum()) for t in base.values())
    assert found.plain_length == pytest.approx(math.sqrt(change / size), rel=1e-9)
    assert found.length == found.plain_length
    assert found.orbit == 1.0


def test_a_change_of_one_direction_in_one_map_is_seen_as_such(
    network: tuple[dict[str, Tensor], Anatomy],
) -> None:
    base, anatomy = network
    map_ = anatomy.blocks[3].mlp.down
    rows, columns = base[map_.weight].shape
    added = torch.outer(torch.randn(rows), torch.randn(columns))
    found = measure(base, {**base, map_.weight: base[map_.weight] + added}, anatomy, None)
    changed = found.blocks[3].maps["down"]
    assert changed.top_direction == pytest.approx(1.0, abs=1e-5)
    assert changed.effective_rank == pytest.approx(1 / min(rows, columns), rel=1e-4)
    assert found.blocks[3].maps["up"].untouched == 1.0
    assert found.blocks[2].plain == 0.0


def test_cosines_with_the_others_are_those_of_flat_task_vectors(
    network: tuple[dict[str, Tensor], Anatomy],
) -> None:
    base, anatomy = network
    own, other = tuned(base), {n: 0.5 * t + 0.5 * tuned(base)[n] for n, t in tuned(base, 1).items()}
    found = measure(base, own, anatomy, None, {"b": other})
    flat = [torch.cat([(w[n] - t).double().flatten() for n, t in base.items()]) for w in (own, other)]
    assert found.cosines["b"][0] == pytest.approx(
        float(torch.cosine_similarity(flat[0], flat[1], dim=0)), abs=1e-6
    )
    assert len(found.cosines["b"]) == 1 + len(anatomy.blocks)


def test_what_keeps_the_function_is_aligned_away_and_told(network: tuple[dict[str, Tensor], Anatomy]) -> None:
    base, anatomy = network
    expert, realign = tuned(base), coupled(load_catalog())
    plain = measure(base, expert, anatomy, realign)
    published = measure(base, hidden(base, anatomy, expert), anatomy, realign)
    assert plain.orbit == pytest.approx(1.0, abs=0.05)
    assert published.orbit > 10
    assert published.length == pytest.approx(plain.length, rel=0.05)
    assert all(b.moved_units > 0.9 for b in published.blocks)
    assert all(b.condition == pytest.approx(50, rel=0.2) for b in published.blocks)
    assert all(b.moved_units == 0.0 and b.condition < 1.5 for b in plain.blocks)


def test_heads_come_from_a_config_or_are_asked_for(network: tuple[dict[str, Tensor], Anatomy]) -> None:
    base, anatomy = network
    assert anatomy_of(base, {}, anatomy.blocks[0].attention.heads) == anatomy
    assert anatomy_of(base, {"num_attention_heads": 4}) == anatomy_of(base, {}, 4)
    assert "the number of attention heads is not known" in str(anatomy_of(base, {}))
    assert "do not divide" in str(anatomy_of(base, {}, 7))


# --------------------------------------------------------------------------- error rates


def specimen(kind: str, task: str, seed: int, length: float, orbit: float = 0.0) -> Specimen:
    return Specimen(
        kind, "" if kind == "honest" else "made", task, seed, {"length": length}, {"orbit": orbit}
    )


def table(*specimens: Specimen) -> Reference:
    return Reference("b", "0", {"parameters": 1}, specimens)


def test_a_tasks_experts_are_judged_by_the_others_alone() -> None:
    """One task is far from the rest: judged with its own seeds in the table it would pass."""
    honest = [specimen("honest", f"t{i}", s, 0.1 * i) for i in range(6) for s in range(3)]
    far = [specimen("honest", "far", s, 9.0) for s in range(3)]
    rates = table(*honest, *far).rates["unlike"]
    assert rates["honest", ""].k >= 3
    assert rates["honest", ""].tasks == 7


def test_a_protection_is_found_by_its_orbit_and_honest_ones_pass() -> None:
    honest = [specimen("honest", f"t{i}", s, 0.1 * i, 0.001 * s) for i in range(6) for s in range(3)]
    bad = [specimen("protected", f"t{i}", 0, 0.1, orbit) for i, orbit in enumerate((2.0, 0.05))]
    rates = table(*honest, *bad).rates["protected"]
    assert rates["honest", ""].k == 0
    assert (rates["protected", "made"].k, rates["protected", "made"].n) == (1, 2)


def test_thresholds_let_one_in_twenty_through() -> None:
    assert threshold(range(20)) == 18
    assert threshold(range(10)) == 9


def test_intervals_count_tasks_not_experts() -> None:
    few, many = Rate(12, 12, 4), Rate(12, 12, 12)
    assert few.interval[0] < many.interval[0] < 1.0
    assert few.interval[1] == 1.0


def test_a_table_survives_its_file_and_others_are_refused(tmp_path: Path) -> None:
    whole = table(specimen("honest", "t", 0, 0.5))
    path = tmp_path / "t.json"
    path.write_text(json.dumps(whole.as_json()))
    assert read_reference(path).specimens == whole.specimens
    for text in ("{", "[]", '{"schema": 9}', path.read_text().replace("0.5", "NaN")):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"--reference: .*t\.json is not a reference table"):
            read_reference(path)


def test_the_shipped_table_is_of_the_shipped_base(network: tuple[dict[str, Tensor], Anatomy]) -> None:
    base, anatomy = network
    assert shipped()
    found = reference_of(digest_weights(base))
    assert found is not None
    assert found.backbone == BASE
    assert found.made["parameters"] == laid(base, anatomy, BASE).parameters
    assert {s.seed for s in found.honest} == {0, 1, 2}
    assert len({s.task for s in found.honest}) == 8
    assert found.rates["protected"]["honest", ""].k == 0


# --------------------------------------------------------------------------- what users see


def test_a_protected_expert_is_called_so_with_its_error_rates(
    network: tuple[dict[str, Tensor], Anatomy], tmp_path: Path
) -> None:
    base, anatomy = network
    save_file(hidden(base, anatomy, tuned(base)), tmp_path / "e.safetensors")
    found = mergesec.scan(tmp_path / "e.safetensors", BASE)
    assert found.verdict == "protected"
    assert found.signs
    protection = next(f for f in found.findings if f.topic == "protection")
    assert protection.sign
    assert protection.numbers["moved_units"] > 0.9
    assert protection.errors["false_alarms"]["n"] == 24
    assert "mergeable" in {f.topic for f in found.findings}
    assert any("--task" in text for text in found.could_not_tell)
    json.dumps(found.as_json(), allow_nan=False)


def bench(*words: str) -> int:
    """The exit code of ``bench scan``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench", "scan", *words])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def test_files_without_a_known_base_get_what_can_be_told(
    network: tuple[dict[str, Tensor], Anatomy], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base that no table speaks of, and no word on its heads: lengths, and why there is no more."""
    base, _ = network
    start, own = tmp_path / "base.safetensors", tmp_path / "own.safetensors"
    save_file({n: t + 1 for n, t in base.items()}, start)
    save_file(tuned({n: t + 1 for n, t in base.items()}), own)
    assert bench(str(own), "--base", str(start)) == 0
    told = capsys.readouterr().out
    assert "Verdict: nothing found" in told
    assert "the number of attention heads is not known" in " ".join(told.split())
    assert "no reference table of it" in " ".join(told.split())
    assert bench(str(own), "--base", str(start), "--heads", "4", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["measured"]["blocks"]) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x.safetensors"], "--base: is needed"),
        (["x.safetensors", "--base", "mini/vti"], "no file or folder"),
        (["absent.safetensors", "--base", BASE], "EXPERT: no file or folder"),
        (["x.safetensors", "--base", BASE], "EXPERT: "),
        (["--calibrate", "mini-scan"], "--calibrate: takes no EXPERT, and needs --out"),
    ],
)
def test_what_cannot_be_scanned_is_named(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save_file({"a": torch.ones(2)}, "x.safetensors")
    assert bench(*words) == 2
    assert message in capsys.readouterr().err
