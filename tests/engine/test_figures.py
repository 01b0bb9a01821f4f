"""Pictures of synthetic records: which are drawn, and that what is drawn are the boards' numbers."""

from __future__ import annotations

import builtins
import importlib.util
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergesec.errors import UsageError
from mergesec.evidence.boards import make_boards
from mergesec.evidence.estimates import Reader
from mergesec.evidence.records import Component, Count, Record, count, read_records
from mergesec.figures.backdoor import mask_sparsity
from mergesec.figures.canvas import Caption, Picture, limits, look_of, require_matplotlib
from mergesec.figures.frontier import standings
from mergesec.figures.gallery import chosen, make_figures, write_figures
from mergesec.figures.sweeps import find_sweeps

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("query", "up", "all")


def _bits(k: int, n: int) -> Any:
    return np.arange(n) < k


def _k(k: int, n: int = 100) -> Count:
    return count(_bits(k, n))


def _asr(k: int) -> Count:
    """k of the 90 samples outside the target class."""
    return count(_bits(k, 100), _bits(90, 100))


def _record(threat: str, counts: dict[str, Count], **fields: Any) -> Record:
    given: dict[str, Any] = {
        "cell": "c", "grid": "g", "suite": "s", "backbone": "b", "protocol": "inductive", "threat": threat,
        "merging": "ta", "attack": "none", "defense": "none", "subject": "" if threat == "clean" else "s/a",
        "target_class": 0, "experts": ["s/a", "s/b"], "seed": 0, "status": "done", "counts": counts,
    }  # fmt: skip
    return Record(**{**given, **fields})


def _scaled(x: float) -> dict[str, Any]:
    """Fields of a record of task arithmetic with this coefficient."""
    method = Component(name="task_arithmetic", parameters={"scaling": x})
    return {"merging": f"task_arithmetic(scaling={x})", "components": {"merging": method}}


def _accuracies(tasks: str, **roles: int) -> dict[str, Count]:
    """Hits of 100, one more on each further task."""
    return {f"acc/{role}/s/{t}": _k(k + i) for role, k in roles.items() for i, t in enumerate(tasks)}


def _protection(
    defense: str = "p", attack: str = "none", merged: int = 20, tasks: str = "ab", **fields: Any
) -> Record:
    counts = _accuracies(
        tasks,
        base=10,
        expert=90,
        published=89,
        recovered=88,
        clean_merge=80,
        protected_merge=20,
        merge=merged,
    )
    if defense != "none":
        suffix = "" if attack == "none" else "_recovered"
        values = {
            f"distance{suffix}/{w}/{k}": 0.1 + 0.01 * merged for w in ("to_base", "to_expert") for k in KINDS
        }
        fields.setdefault("values", values)
    counts = fields.pop("counts", counts)
    return _record(
        "protection", counts, defense=defense, attack=attack, experts=[f"s/{t}" for t in tasks], **fields
    )


def _backdoor(
    defense: str = "none", attack: str = "bad", hit: int = 60, accurate: int = 70, **fields: Any
) -> Record:
    tasks = fields.pop("tasks", "ab")
    counts = _accuracies(tasks, base=10, clean_merge=80, merge=accurate, poisoned=85)
    for role, k in {"merge": hit, "clean_merge": 9, "base": 3, "poisoned": 89}.items():
        counts |= {f"asr/{role}/s/{t}": _asr(k) for t in tasks}
    counts = fields.pop("counts", counts)
    fields = {"attack": attack, "defense": defense, "experts": [f"s/{t}" for t in tasks], **fields}
    return _record("backdoor", counts, **fields)


def _clean(merging: str, accurate: int, **fields: Any) -> Record:
    return _record(
        "clean", _accuracies("ab", base=30, expert=90, clean_merge=accurate), merging=merging, **fields
    )


def _drawn(records: list[Record]) -> dict[str, Picture]:
    return {p.name: p for p in make_figures(records)}


def _frame(records: list[Record], name: str) -> Any:
    return next(b for b in make_boards(records) if b.name == name).frame


def _panel(picture: Picture, title: str) -> Any:
    (found,) = [a for a in picture.figure.axes if a.get_title(loc="left").split() == title.split()]
    return found


def _heat(picture: Picture, title: str) -> dict[tuple[str, str], float]:
    ax = _panel(picture, title)
    values = np.ma.filled(ax.collections[0].get_array(), np.nan)
    # panels side by side show the names of their rows once, and know them all
    rows = [ax.yaxis.get_major_formatter()(y, i) for i, y in enumerate(ax.get_yticks())]
    columns = [t.get_text() for t in ax.get_xticklabels()]
    return {(r, c): values[i, j] for i, r in enumerate(rows) for j, c in enumerate(columns)}


def _lines(picture: Picture, title: str) -> dict[str, tuple[list[float], list[float]]]:
    lines = _panel(picture, title).get_lines()
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


# --------------------------------------------------------------------------- clean


def test_accuracies_of_merges_are_the_boards() -> None:
    records = [_clean("low", 40), _clean("high", 80), _clean("high", 82, seed=1)]
    frame = _frame(records, "clean").set_index("method")
    pictures = _drawn(records)
    assert pictures.keys() == {"clean-accuracy", "clean-tasks"}
    ax = _panel(pictures["clean-accuracy"], "accuracy, mean over tasks")
    names = [t.get_text() for t in ax.get_yticklabels()]
    assert names == ["high", "low"]
    dots, _, (bars,) = ax.containers[0].lines
    assert list(dots.get_xdata()) == pytest.approx([100 * frame.loc[n, "accuracy"] for n in names])
    ends = [(b[0, 0], b[1, 0]) for b in bars.get_segments()]
    for n, (low, high) in zip(names, ends, strict=True):
        assert (low, high) == pytest.approx(
            (100 * frame.loc[n, "accuracy_low"], 100 * frame.loc[n, "accuracy_high"])
        )
    tasks = _heat(pictures["clean-tasks"], "")
    for method in ("high", "low", "(experts)", "(base)"):
        assert tasks[method, "b"] == pytest.approx(frame.loc[method, "s/b"])


def test_methods_that_differ_in_their_coefficient_make_a_curve() -> None:
    # 0.3 is task arithmetic's default, which labels leave out and parameters do not
    given = [(0.1, 40, {}), (0.3, 60, {"merging": "task_arithmetic"}), (0.8, 50, {})]
    pictures = _drawn([_clean(accurate=k, **{**_scaled(x), **label}) for x, k, label in given])
    found = _lines(pictures["clean-coefficient"], "2 experts")
    assert found["task_arithmetic"] == ([0.1, 0.3, 0.8], pytest.approx([40.5, 60.5, 50.5]))
    assert found["experts"][1] == pytest.approx([90.5, 90.5])


# --------------------------------------------------------------------------- protection


def test_heat_maps_show_merged_accuracy_and_recovery() -> None:
    records = [
        _protection("none"),
        _protection("p"),
        _protection("p", "weak", 30),
        _protection("p", "strong", 70),
    ]
    frame = _frame(records, "protection_cells").set_index(["defense", "attack"])
    picture = _drawn(records)["protection-heat"]
    merged = _heat(picture, "ta, 2 experts\nmerged accuracy")
    assert merged["p", "strong"] == frame.loc[("p", "strong"), "MMP_attacked"] == pytest.approx(0.7)
    assert math.isnan(merged["none", "weak"])  # no such cell
    recovery = _heat(picture, "ta, 2 experts\nrecovery")
    assert recovery["p", "weak"] == frame.loc[("p", "weak"), "recovery"] == pytest.approx(10 / 60)
    assert math.isnan(recovery["p", "none"])


def test_more_settings_than_defenses_turn_the_heat_map() -> None:
    records = [_protection("p", "weak", 30 + i, merging=m) for i, m in enumerate(("m1", "m2", "m3"))]
    merged = _heat(_drawn(records)["protection-heat"], "p\nmerged accuracy")
    assert merged["m2, 2 experts", "weak"] == pytest.approx(0.31)


def test_the_landscape_has_a_curve_for_each_attack_and_both_sides() -> None:
    records = [
        _protection("p", attack, 20 + place + (9 if attack == "aga" else 0), **_scaled(x))
        for place, x in enumerate((0.1, 0.5, 0.9))
        for attack in ("none", "aga")
    ]
    picture = _drawn(records)["protection-landscape-task_arithmetic-scaling"]
    where = "p, task_arithmetic, 2 experts"
    victim = _lines(picture, f"{where}\nprotected task")
    assert victim["unprotected"] == ([0.1, 0.5, 0.9], pytest.approx([80, 80, 80]))
    assert victim["protected"][1] == pytest.approx([20, 20, 20])
    assert victim["attack aga"][1] == pytest.approx([29, 30, 31])
    assert victim["base"][1] == pytest.approx([10, 10, 10])
    rider = _lines(picture, f"{where}\nother tasks")
    assert rider["attack aga"][1] == pytest.approx([30, 31, 32])


def test_accuracy_against_experts_and_against_owners() -> None:
    records = [_protection("p", merged=20 + len(tasks), tasks=tasks) for tasks in ("ab", "abc", "abcd")]
    records += [_protection("p", tasks="abcd", protected=n, secrets="shared") for n in (2, 3, 4)]
    pictures = _drawn(records)
    found = _lines(pictures["protection-experts"], "p, ta\nprotected task")
    assert found["protected"] == ([1, 2, 3], pytest.approx([20, 20, 20]))
    found = _lines(pictures["protection-owners"], "p, ta, 4 experts, shared secrets\nprotected task")
    assert found["protected"][0] == [2, 3, 4]


def test_every_pair_of_victim_and_free_rider_has_its_place_in_the_matrix() -> None:
    tasks = "abc"
    records = []
    for v in range(3):
        for o in range(3):
            if v != o:
                pair = "".join(sorted(tasks[v] + tasks[o]))
                place = {"tasks": pair, "subject": f"s/{tasks[v]}"}
                records += [_protection("p", **place), _protection("p", "aga", 40 + 10 * v + o, **place)]
    picture = _drawn(records)["protection-pairs-p-0"]
    found = _heat(picture, "after aga")
    for record in records:
        if record.attack == "aga":
            other = next(t for t in record.experts if t != record.subject)
            value = _frame([record], "protection_cells")["MMP_attacked"].item()
            assert found[record.subject[2:], other[2:]] == pytest.approx(value)
    assert math.isnan(found["a", "a"])
    assert _heat(picture, "unprotected (MMP-)")["a", "b"] == pytest.approx(0.8)


def test_distances_are_marks_of_the_boards_means() -> None:
    records = [_protection("p", a, m, seed=s) for s in (0, 1) for a, m in (("none", 20 + s), ("aga", 50 + s))]
    frame = _frame(records, "protection_distances").set_index("attack")
    ax = _panel(_drawn(records)["protection-distances"], "p to the base")
    assert ax.get_yscale() == "log" and not ax.patches  # a bar's length means nothing there
    marks = sorted(float(c.lines[0].get_ydata()[0]) for c in ax.containers)
    expected = [frame.loc[a, f"to_base/{k}"] for a in ("none", "aga") for k in KINDS]
    assert marks == pytest.approx(sorted(expected))


def test_a_recovery_whose_interval_says_nothing_is_grey() -> None:
    """Two seeds that disagree: an interval of hundreds of points."""
    records = [_protection("p"), _protection("p", seed=1)]
    records += [_protection("p", "sure", 50, seed=s) for s in (0, 1)]
    records += [_protection("p", "wild", m, seed=s) for s, m in ((0, 5), (1, 75))]
    frame = _frame(records, "protection_cells").set_index("attack")
    assert frame.loc["wild", "recovery_high"] - frame.loc["wild", "recovery_low"] > 1
    picture = _drawn(records)["protection-heat"]
    found = _heat(picture, "ta, 2 experts\nrecovery")
    assert found["p", "sure"] == pytest.approx(0.5) and math.isnan(found["p", "wild"])
    numbers = {t.get_text(): t.get_color() for t in _panel(picture, "ta, 2 experts recovery").texts}
    assert numbers[f"{100 * frame.loc['wild', 'recovery']:.1f}"] == "#8a8a8a"


def test_long_labels_are_short_on_axes_and_told_in_the_footnote() -> None:
    long = "p(a=1, b=2, c=3, d=4, e=5, f=6)"
    records = [_protection("none"), _protection(long), _protection(long, "aga", 60)]
    picture = _drawn(records)["protection-heat"]
    assert _heat(picture, "ta, 2 experts\nmerged accuracy")["p", "aga"] == pytest.approx(0.6)
    assert f"p = {long}" in " ".join(picture.figure.get_supxlabel().split())


def test_methods_that_keep_weights_per_task_have_a_picture_of_their_own() -> None:
    pictures = _drawn([_clean("ties", 60), _clean("emr", 80), _clean("mine", 50)])
    shown = {
        name: [t.get_text() for t in pictures[name].figure.axes[0].get_yticklabels()]
        for name in ("clean-accuracy", "clean-accuracy-per-task")
    }
    assert shown == {"clean-accuracy": ["ties", "mine"], "clean-accuracy-per-task": ["emr"]}


def test_no_picture_is_wider_than_a_page_or_as_told(tmp_path: Path) -> None:
    attacks = [f"attack_number_{i}" for i in range(20)]
    records = [_protection(d) for d in ("none", "p")]
    records += [_protection("p", a, 30 + i) for i, a in enumerate(attacks)]
    for width in (6.8, 4.8):
        for picture in make_figures(records, width):
            assert picture.figure.get_size_inches()[0] <= width
            assert picture.figure.get_size_inches()[1] < 12
    heats = [p for p in make_figures(records) if p.name.startswith("protection-heat")]
    shown = [t.get_text() for p in heats for a in p.figure.axes for t in a.get_xticklabels()]
    assert sorted(shown) == sorted(["none", *attacks] * 2)  # in parts, none lost


def test_limits_are_those_of_what_is_drawn() -> None:
    assert limits([np.array([3.0, 5.0, np.nan])]) == pytest.approx((-1, 9))
    low, high = limits([np.array([0.0, 100.0])])
    assert low == pytest.approx(-2) and high == pytest.approx(102)
    assert limits([]) == limits([np.array([0.0])])
    assert limits([np.array([-40.0, 60.0])])[0] < -40


def test_only_some_pictures_and_other_formats(tmp_path: Path) -> None:
    pictures = make_figures([_protection("none"), _protection("p"), _protection("p", "aga", 60)])
    assert [p.name for p in chosen(pictures, ["protection-d"])] == ["protection-distances"]
    assert chosen(pictures, []) == pictures
    with pytest.raises(
        UsageError, match="--only: no picture 'protection-hat'; did you mean 'protection-heat'"
    ):
        chosen(pictures, ["protection-heat", "protection-hat"])
    first = write_figures(tmp_path / "1", pictures[:1], endings=["pdf"])
    again = write_figures(
        tmp_path / "2",
        make_figures([_protection("none"), _protection("p"), _protection("p", "aga", 60)])[:1],
        endings=["pdf"],
    )
    assert first[0].read_bytes()[:5] == b"%PDF-" and first[0].read_bytes() == again[0].read_bytes()
    assert b"CreationDate" not in first[0].read_bytes()
    small, large = (
        write_figures(tmp_path / str(dpi), pictures[:1], dpi=dpi, endings=["png"])[0].stat().st_size
        for dpi in (50, 100)
    )
    assert small < large


def test_the_frontier_compares_over_the_cells_in_which_an_unprotected_expert_was_distilled() -> None:
    records = [
        _protection("none", "none", merged=80),
        _protection("none", "distill", merged=50),
        _protection("p", "none", merged=20),
        _protection("p", "distill(steps=9)", merged=51),
        _protection("p", "aga", merged=75),
        _protection("p", "aga", merged=99, seed=1),  # nothing was distilled there
        _protection("unasked", "aga", merged=75),
    ]
    (rows,) = standings(records, Reader()).values()
    found = {row.defense: row for row in rows}
    assert set(found) == {"none", "p"}
    assert found["p"].best.value == pytest.approx(0.75)
    assert found["p"].by == "aga"
    assert found["p"].distilled.value == pytest.approx(0.51)
    assert found["none"].distilled.value == pytest.approx(0.5)
    assert found["p"].lost.value == pytest.approx(0.01)
    picture = _drawn(records)["protection-frontier"]
    assert [t.get_text() for t in picture.figure.axes[0].get_yticklabels()] == ["none (1.0)", "p (1.0)"]
    assert "protection-frontier" not in _drawn([r for r in records if "distill" not in r.attack])


def test_ownership_marks_have_a_picture() -> None:
    counts = _accuracies("ab", expert=90, published=90, clean_merge=80, protected_merge=80, merge=80, base=10)
    counts |= {f"mark/{s}/s/a": _k(k) for s, k in (("published", 100), ("merge", 61), ("base", 12))}
    records = [
        _record("protection", counts, defense="w", values={"detected/published": 1.0, "detected/base": 0.0})
    ]
    picture = _drawn(records)["ownership"]
    assert _heat(picture, "w\nbits or queries that\nanswer")["ta, 2 experts", "merge"] == pytest.approx(0.61)
    assert _heat(picture, "w\nshare of cells that verify")["ta, 2 experts", "published"] == 1


# --------------------------------------------------------------------------- backdoor


def test_accuracy_against_asr_and_the_heat_map() -> None:
    records = [
        _backdoor("none", hit=72, accurate=78),
        _backdoor("d", hit=18, accurate=70),
        _backdoor("e", hit=45, accurate=60),
    ]
    frame = _frame(records, "backdoor").set_index("defense")
    pictures = _drawn(records)
    ax = _panel(pictures["backdoor-pareto"], "bad, 2 experts")
    step = next(line for line in ax.get_lines() if line.get_drawstyle() == "steps-post")
    expected = [(100 * frame.loc[d, "BA"], 100 * frame.loc[d, "succession"]) for d in ("none", "d")]
    assert np.column_stack(step.get_data()) == pytest.approx(np.array(expected))
    numbers = {t.get_text(): t for t in ax.texts}
    assert numbers.keys() == {"1", "2", "3"}  # every mark has its number, and every number its name
    key = [t.get_text() for a in pictures["backdoor-pareto"].figure.axes for t in a.texts if a is not ax]
    assert key == ["1 no defense", "2 d", "3 e"]
    boxed = {name for name, text in numbers.items() if text.get_bbox_patch().get_edgecolor()[3] > 0}
    assert boxed == {"1", "2"}
    low, high = ax.get_ylim()
    assert 0 < low < 20 and 70 < high < 100  # the axis is that of the data
    heat = _heat(pictures["backdoor-heat"], "ta, 2 experts\nexcess over the control")
    assert heat["none", "bad"] == frame.loc["none", "backdoor"] == pytest.approx((72 - 9) / 90)


def test_asr_along_the_coefficient_and_against_clean_experts() -> None:
    records = [_backdoor(hit=10 * i, **_scaled(x)) for i, x in enumerate((0.1, 0.5, 0.9), 1)]
    records += [_backdoor(hit=k, tasks=tasks) for k, tasks in ((80, "ab"), (50, "abc"), (20, "abcd"))]
    pictures = _drawn(records)
    found = _lines(
        pictures["backdoor-coefficient-task_arithmetic-scaling"],
        "task_arithmetic, 2 experts\nadversary's task",
    )
    assert found["bad"] == ([0.1, 0.5, 0.9], pytest.approx([1000 / 90, 2000 / 90, 3000 / 90]))
    assert found["bad, control"][1] == pytest.approx([10, 10, 10])
    found = _lines(pictures["backdoor-experts"], "ta\nadversary's task")
    assert found["bad"] == ([1, 2, 3], pytest.approx([8000 / 90, 5000 / 90, 2000 / 90]))


def test_masks_are_drawn_per_layer() -> None:
    told = {
        "mask_sparsity": {
            "blocks.0.a.weight": 0.2,
            "blocks.0.b": 0.4,
            "blocks.1.a.weight": 0.5,
            "norm.weight": 0.1,
        },
        "mask_sparsity_shared": {"blocks.1.a.weight": 0.9},
    }
    records = [_backdoor("dam", facts={"merge": told}), _backdoor("none")]
    assert mask_sparsity(records[0]) == {
        "mask": {"blocks.0": [0.2, 0.4], "blocks.1": [0.5], "norm": [0.1]}, "shared": {"blocks.1": [0.9]},
    }  # fmt: skip
    assert mask_sparsity(records[1]) == {}
    found = _lines(_drawn(records)["backdoor-masks"], "dam")
    assert found["mask"] == ([0, 1, 2], pytest.approx([30, 50, 10]))
    assert found["shared"] == ([1], pytest.approx([90]))


# --------------------------------------------------------------------------- labels and titles


def test_a_sweep_changes_one_number_and_nothing_else() -> None:
    given = {
        "m": ("m", {"x": 1.0, "y": "a"}), "m(x=2)": ("m", {"x": 2.0, "y": "a"}), "m(x=3)": ("m", {"x": 3, "y": "a"}),
        "m(x=tuned)": ("m", {"x": "tuned", "y": "a"}), "m(x=2, y=b)": ("m", {"x": 2.0, "y": "b"}),
        "m(x=3, y=b)": ("m", {"x": 3.0, "y": "b"}),
        "n(x=1)": ("n", {"x": 1}), "n(x=2)": ("n", {"x": 2}), "n(x=3)": ("n", {"x": 3}),
    }  # fmt: skip
    methods = {label: Component(name=name, parameters=bound) for label, (name, bound) in given.items()}
    sweeps = find_sweeps(methods)
    assert [(s.title, s.parameter, dict(s.values)) for s in sweeps] == [
        ("m(y=a)", "x", {"m": 1.0, "m(x=2)": 2.0, "m(x=3)": 3.0}),
        ("n", "x", {"n(x=1)": 1.0, "n(x=2)": 2.0, "n(x=3)": 3.0}),
    ]


def test_titles_tell_grid_seeds_protocol_and_partial_data() -> None:
    partial = {"provenance": {"partial": {"s/a": "5 of 10 images"}}}
    records = [
        _protection("none"),
        _protection("p", seed=2, **partial),
        _protection("p", "aga", status="failed"),
    ]
    picture = _drawn(records)["protection-heat"]
    title, foot = picture.figure.get_suptitle(), picture.figure.get_supxlabel()
    assert "g · s on b · seeds 0, 2 · inductive · partial data · 1 of 3 cells missing" in " ".join(
        title.split()
    )
    assert "s/a (5 of 10 images)" in " ".join(foot.split())
    assert "partial" not in Caption.of([_protection("p")]).facts


def test_no_two_of_many_curves_look_alike() -> None:
    looks = [look_of(i) for i in range(28)]
    assert len(set(looks)) == 28


# --------------------------------------------------------------------------- files


@pytest.mark.filterwarnings("error:constrained_layout")
def test_files_are_the_same_bytes_again_and_carry_no_date(tmp_path: Path) -> None:
    records = [_protection("none"), _protection("p"), _protection("p", "aga", 60)]
    first = write_figures(tmp_path / "1", make_figures(records))
    second = write_figures(tmp_path / "2", make_figures(records))
    assert {p.name for p in first} == {
        f"protection-{n}.{e}" for n in ("heat", "distances") for e in ("svg", "png")
    }  # fmt: skip
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    svg = (tmp_path / "1" / "protection-heat.svg").read_text()
    assert "<dc:date>" not in svg
    assert "Matplotlib v" not in svg


@pytest.mark.filterwarnings("error:constrained_layout")
def test_pictures_a_grid_no_longer_has_are_removed_only_where_asked(tmp_path: Path) -> None:
    old = tmp_path / "old.svg"
    old.write_text("")
    pictures = make_figures([_clean("m", 50)])
    write_figures(tmp_path, pictures)
    assert old.exists()
    write_figures(tmp_path, pictures, tidy=True)
    assert {p.stem for p in tmp_path.iterdir()} == {"clean-accuracy", "clean-tasks"}


def test_missing_matplotlib_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    there = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return there(name, *args, **kwargs)

    for module in [m for m in sys.modules if m.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"figures: drawing needs matplotlib; .*'mergesec\[plots\]'"):
        require_matplotlib()
    with pytest.raises(UsageError, match="matplotlib"):
        make_figures([_clean("m", 50)])


def test_nothing_done_draws_nothing() -> None:
    records = [_protection("p", status="missing", counts={}), _backdoor(status="failed")]
    assert all(p.name in ("protection-heat", "backdoor-heat") for p in make_figures(records))


def test_whiskers_of_equal_distances_do_not_reach_below_nothing() -> None:
    """0.1 + 0.1 + 0.1 over 3 is above 0.1: a mean may be off by a rounding error."""
    assert sum([0.1] * 3) / 3 > 0.1
    records = [_protection("p", seed=s) for s in (0, 1, 2)]
    records = [
        r.model_copy(
            update={"values": {n: 0.1 if n.startswith("distance") else v for n, v in r.values.items()}}
        )
        for r in records
    ]
    assert "protection-distances" in _drawn(records)


def test_pages_show_pictures_that_are_drawn_from_shipped_records() -> None:
    """docs/pictures.py draws what pages show, and nothing else; the fast ones are what it would draw now."""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert spec and spec.loader
    pictures = importlib.util.module_from_spec(spec)
    sys.modules["pictures"] = pictures
    spec.loader.exec_module(pictures)
    docs = ROOT / "docs"
    pages = "".join(path.read_text() for path in (*(docs / "results").glob("*.md"), docs / "frontier.md"))
    assert set(pictures.SHOWN) == set(re.findall(r"\((?:\.\./)?figures/([\w-]+)\.svg\)", pages))
    assert set(pictures.SHOWN) <= {path.stem for path in pictures.FOLDER.glob("*.svg")}
    shown = pictures.SHOWN["backdoor-experts"]
    records = read_records(ROOT / "results" / "records", shown.grid)
    (picture,) = [p for p in make_figures(records, shown.width) if p.name == shown.picture]
    title = " ".join(picture.figure.get_suptitle().split())
    assert shown.grid in title
    with pytest.raises(UsageError, match="did you mean 'backdoor-experts'"):
        pictures.main(["backdoor-expert"])
