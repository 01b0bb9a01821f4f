"""Triggered samples: what is read from the store is what is shown, and what is missing is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergesec.cli import figures_verb
from mergesec.conformance.battery import MICRO, MICRO_TEXT
from mergesec.errors import UsageError
from mergesec.evidence.records import Record
from mergesec.execution.harvest import make_records, write_records
from mergesec.execution.scheduler import Outcome
from mergesec.execution.steps import run
from mergesec.execution.store import Store
from mergesec.execution.work import Bench
from mergesec.figures.canvas import Picture, style, write_picture
from mergesec.figures.gallery import write_figures
from mergesec.figures.sample_sheets import AMPLIFIED, marked, sample_pictures, told
from mergesec.figures.samples import SHOWN, Aim, Samples, collect_samples, pick_rows
from mergesec.images import image_change
from mergesec.planning.catalog import Catalog, load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import Plan, make_plan
from mergesec.planning.resolve import resolve

BARS, BLOBS, RINGS = TASKS = ("micro/bars", "micro/blobs", "micro/rings")
TEXT = ("micro/animals", "micro/colours", "micro/tools")
PATCH = {"name": "badmerging", "trigger": "checkerboard"}
ATTACKS = [{"name": "blended", "rate": [0.1, 0.2]}, "none", {"name": "badnets", "patch": [5, 8]}]


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog([MICRO, MICRO_TEXT])


def _raw(tasks: tuple[str, ...] = TASKS, **axes: Any) -> dict[str, Any]:
    backbone = "micro/vit" if tasks == TASKS else "micro/text"
    return {
        "name": "g", "suite": {"backbone": backbone, "tasks": list(tasks)},
        "axes": {
            "merging": ["simple_average", "ties"], "attacks": ATTACKS, "adversary": [tasks[0]],
            "target_class": [2], **axes,
        },
        "threats": ["backdoor"], "seeds": [0, 1], "recipe": {"epochs": 1, "max_train": 64},
    }  # fmt: skip


_steps: dict[str, tuple[bytes, dict[str, Any]]] = {}
"""What steps gave, by key: tests share the micro world."""


def _made(catalog: Catalog, folder: Path, raw: dict[str, Any]) -> tuple[Plan, Bench, list[Record]]:
    """A grid of which only triggers were made, and looked at."""
    plan = make_plan(resolve(parse_grid(raw, "grid g"), catalog), lambda task: "")
    bench = Bench(Store(folder), catalog, torch.device("cpu"))
    kinds = {key: step.kind for key, step in plan.steps.items()}
    for key, step in plan.steps.items():
        if step.kind in ("data", "base", "head", "trigger", "visibility"):
            blob, info = _steps[key] = _steps.get(key) or run(step, bench, kinds)
            bench.store.put(step.kind, key, blob, {**info, "seconds": 1.0, "peak_mb": 1.0, "device": "cpu"})
    return plan, bench, make_records(plan, bench.store, Outcome())


@pytest.fixture(scope="module")
def made(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Bench, list[Record]]:
    return _made(catalog, tmp_path_factory.mktemp("made"), _raw())


def test_attacks_come_in_order_on_the_same_images_each_trigger_once(made: Any) -> None:
    plan, bench, records = made
    (samples,), missing = collect_samples(plan, bench, records)
    assert not missing
    assert samples.aim == Aim(BARS, BARS, 2)
    assert [row.attack for row in samples.rows] == ["blended", "badnets", "badnets(patch=8)"]
    assert {r.seed for r in samples.records} == {0}
    data = next(s for s in plan.steps.values() if s.kind == "data" and BARS in s.args)
    task = bench.component(dict(data.components)["task"])
    split = task.unpack(bench.read("data", data.key)[0])["test"]
    assert len(samples.inputs) == len(samples.classes) == SHOWN["image"]
    names = list(task.classes)
    assert samples.target == names[2]
    assert samples.classes == [names[0], names[1], names[3]] * 2  # three classes beside the target
    for image, name in zip(samples.inputs, samples.classes, strict=True):
        places = (split.inputs == (image * 255).round().byte()).flatten(1).all(1).nonzero().flatten()
        assert names.index(name) in split.targets[places].tolist()
    white = samples.rows[1].inputs - samples.inputs
    assert float(white[:, :, 4:, 4:].abs().max()) > 0
    assert not white[:, :, :8, :8].any()  # a patch of five of 32 pixels, at the bottom right
    assert float((samples.rows[0].inputs - samples.inputs).abs().mean()) > 0.02


TAKES_OVER = ["mergebackdoor", PATCH | {"name": "sparse_backdoor_vector"}, "lora_attack", PATCH]
"""Two of them with the trigger of an attack that the grid lacks."""


def test_attacks_with_anothers_trigger_share_its_row(catalog: Catalog, tmp_path: Path) -> None:
    plan, bench, records = _made(
        catalog, tmp_path, {**_raw(attacks=TAKES_OVER, merging=["ties"]), "seeds": [0]}
    )
    triggers = {dict(s.components)["attack"].name for s in plan.steps.values() if s.kind == "trigger"}
    assert triggers == {"badmerging", "badnets"}  # of which the grid names the first alone
    (samples,), missing = collect_samples(plan, bench, records)
    assert not missing
    patched = "sparse_backdoor_vector(trigger=checkerboard), badmerging(trigger=checkerboard)"
    assert [row.attack for row in samples.rows] == ["mergebackdoor", patched, "lora_attack"]


def test_measures_are_the_records_or_else_the_stores(made: Any) -> None:
    plan, bench, records = made
    (samples,), _ = collect_samples(plan, bench, records)
    step = next(s for s in plan.steps.values() if s.kind == "visibility")
    assert samples.rows[0].visibility == bench.store.meta("visibility", step.key)["info"]["visibility"]
    assert samples.rows[0].visibility["area"] > 0.9
    done = [r.model_copy(update={"values": {"visibility/area": 0.25, "screen/caught": 1.0}}) for r in records]
    (samples,), _ = collect_samples(plan, bench, done)
    assert samples.rows[0].visibility == {"area": 0.25}
    old = [r.model_copy(update={"steps": {"visibility": "of another version"}}) for r in done]
    (samples,), _ = collect_samples(plan, bench, old)
    assert samples.rows[0].visibility["area"] > 0.9


def test_off_task_shows_the_task_aimed_at(catalog: Catalog, tmp_path: Path) -> None:
    raw = {**_raw(attacks=[PATCH], merging=["ties"], target_task=["", RINGS]), "seeds": [0]}
    places, missing = collect_samples(*_made(catalog, tmp_path, raw))
    assert not missing
    assert {s.aim for s in places} == {Aim(BARS, BARS, 2), Aim(RINGS, BARS, 2)}
    with style():
        names = {p.name: p.figure.get_suptitle().split("\n")[0] for p in sample_pictures(places)}
    assert names["backdoor-samples-micro_rings-micro_bars-2"].startswith(
        "Triggered test inputs of micro/rings, trigger made for micro/bars, target class"
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=40), st.integers(0, 7), st.integers(1, 9))
def test_rows_are_of_as_many_classes_as_can_be(labels: list[int], left_out: int, many: int) -> None:
    targets = torch.tensor(labels)
    rows = pick_rows(targets, left_out, many).tolist()
    others = set(labels) - {left_out}
    known = others or {left_out}
    shown = [labels[r] for r in rows]
    assert len(set(rows)) == len(rows) == min(many, sum(label in known for label in labels))
    assert set(shown) <= known
    assert len(set(shown)) == min(many, len(known))
    assert labels.index(shown[0]) == rows[0]
    assert shown[: len(set(shown))] == sorted(set(shown))


# --------------------------------------------------------------------------- what is missing


def test_a_missing_trigger_is_told_and_the_rest_drawn(catalog: Catalog, tmp_path: Path) -> None:
    plan, bench, records = _made(catalog, tmp_path, {**_raw(merging=["ties"]), "seeds": [0]})
    triggers = {s.label: key for key, s in plan.steps.items() if s.kind == "trigger"}
    label = f"trigger {BARS} badnets"
    bench.store.remove("trigger", triggers[label])
    bench.forget(triggers[label])
    (samples,), missing = collect_samples(plan, bench, records)
    assert [row.attack for row in samples.rows] == ["blended", "badnets(patch=8)"]
    assert missing == {label: True}  # measured before: a run would not make it again
    for key, step in plan.steps.items():
        if step.kind == "visibility":
            bench.store.remove("visibility", key)
    assert collect_samples(plan, bench, records)[1] == {label: False}
    path = bench.store.root / "artifacts" / "trigger" / f"{triggers[f'trigger {BARS} blended']}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    bench.forget(path.stem)
    assert collect_samples(plan, bench, records)[1].keys() == {label, f"trigger {BARS} blended"}


def test_another_seed_stands_in_for_a_missing_one(catalog: Catalog, tmp_path: Path) -> None:
    plan, bench, records = _made(catalog, tmp_path, _raw(attacks=["blended"], merging=["ties"]))
    first, second = [key for key, s in plan.steps.items() if s.kind == "trigger"]
    bench.store.remove("trigger", first)
    (samples,), missing = collect_samples(plan, bench, records)
    assert not missing
    assert [r.seed for r in samples.records] == [1]
    wanted = bench.read("trigger", second)[0]
    attack = next(dict(s.components)["attack"] for s in plan.steps.values() if s.kind == "trigger")
    again = bench.component(attack).apply(wanted, samples.inputs)
    torch.testing.assert_close(samples.rows[0].inputs, again)


@pytest.mark.slow
def test_the_verb_draws_tells_and_spares(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, bench, records = made
    grid = tmp_path / "g.yaml"
    grid.write_text(_yaml(_raw()))
    monkeypatch.setenv("MERGESEC_CACHE", str(bench.store.root))
    results = tmp_path / "results"
    write_records(results / "records", records, plan.grid)
    given_: dict[str, Any] = {"results": str(results), "plugin": [str(MICRO), str(MICRO_TEXT)]}
    figures_verb.main([str(grid)], samples=True, **given_)
    shown = capsys.readouterr()
    stem = "backdoor-samples-micro_bars-2"
    assert {f"{stem}.svg", f"{stem}.png"} <= {Path(line).name for line in shown.out.splitlines()}
    assert not shown.err
    with pytest.raises(UsageError, match=r"are for --samples"):
        figures_verb.main(["g"], **given_)
    figures_verb.main(["g"], results=str(results))
    assert (results / "figures" / "g" / f"{stem}.png").exists()  # pictures from records alone spare it
    monkeypatch.setenv("MERGESEC_CACHE", str(tmp_path / "empty"))
    message = (
        rf"--samples: not in the store: .*trigger {BARS} blended.*make it with: bench run --grid .*g\.yaml"
    )
    with pytest.raises(UsageError, match=message):
        figures_verb.main([str(grid)], samples=True, **given_)


def _yaml(raw: dict[str, Any]) -> str:
    import json

    return json.dumps(raw)  # YAML too


# --------------------------------------------------------------------------- pictures


def _pictures(places: list[Samples]) -> list[Picture]:
    with style():
        return list(sample_pictures(places))


def test_strips_show_the_images_and_their_amplified_change(made: Any) -> None:
    (samples,), _ = collect_samples(*made)
    (picture,) = _pictures([samples])
    axes = picture.figure.axes
    assert len(axes) == 2 * (1 + len(samples.rows))
    side = samples.inputs.shape[-1]
    for row, ax in (("clean", axes[0]), (samples.rows[1], axes[4]), (samples.rows[1], axes[5])):
        strip = np.asarray(ax.images[0].get_array())
        for i in range(SHOWN["image"]):
            found = strip[:, i * (side + 1) : i * (side + 1) + side]
            before = samples.inputs[i].permute(1, 2, 0).numpy()
            after = before if row == "clean" else samples.rows[1].inputs[i].permute(1, 2, 0).numpy()
            wanted = np.clip(0.5 + AMPLIFIED * (after - before), 0, 1) if ax is axes[5] else after
            np.testing.assert_allclose(found, wanted, atol=1e-6)
    said = " ".join(axes[4].get_ylabel().split())
    change = image_change(samples.inputs, samples.rows[1].inputs)
    assert said.startswith("badnets area ")
    assert f"RMS {samples.rows[1].visibility['l2']:.3f}" in said
    assert samples.rows[1].visibility["area"] == pytest.approx(change["area"], abs=0.02)
    title = " ".join(picture.figure.get_suptitle().split())
    assert "seeds 0 ·" in title
    assert "missing" not in title


@pytest.mark.filterwarnings("error")
def test_sheets_are_the_same_bytes_again_and_parted_where_tall(made: Any, tmp_path: Path) -> None:
    (samples,), _ = collect_samples(*made)
    for folder in ("1", "2"):
        for picture in _pictures([samples]):
            with style():
                write_picture(tmp_path / folder, picture)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()
    samples.rows *= 10
    names = [p.name for p in _pictures([samples])]
    assert (
        names == [f"backdoor-samples-micro_bars-2-{n}" for n in range(1, len(names) + 1)] and len(names) > 1
    )


def test_samples_of_the_last_time_are_spared_only_if_asked(tmp_path: Path) -> None:
    kept, old = tmp_path / "backdoor-samples-x.svg", tmp_path / "old.svg"
    for path in (kept, old):
        path.write_text("")
    write_figures(tmp_path, [], tidy=True, spare="backdoor-samples")
    assert [p.name for p in tmp_path.iterdir()] == [kept.name]
    write_figures(tmp_path, [], tidy=True)
    assert not kept.exists()


def test_texts_are_shown_with_what_was_put_in_marked(catalog: Catalog, tmp_path: Path) -> None:
    raw = {**_raw(TEXT, attacks=["phrase", "rare_token"], merging=["ties"]), "seeds": [0]}
    (samples,), missing = collect_samples(*_made(catalog, tmp_path, raw))
    assert not missing
    assert len(samples.inputs) == SHOWN["text"]
    (picture,) = _pictures([samples])
    _, phrase, tokens = picture.figure.axes
    for ax, row in ((phrase, samples.rows[0]), (tokens, samples.rows[1])):
        written = [" ".join(text.get_text().split()) for text in ax.texts]
        for text, before, after in zip(written, samples.inputs, row.inputs, strict=True):
            assert "«" in text
            if "…" not in text:
                assert text.replace("«", "").replace("»", "") == " ".join(after.split())
                assert len(after.split()) > len(before.split())
    assert "words" in tokens.get_ylabel()


def test_marks_are_around_new_words_and_long_texts_cut_around_them() -> None:
    assert marked("a b c", "a b cf c") == "a b «cf» c"
    assert marked("a b c", "mn bb a b c tq") == "«mn bb» a b c «tq»"
    assert marked("a b c", "a x c") == "a «x» c"
    assert marked("a b c", "a c") == "a c"
    long = [f"w{i:03}" for i in range(200)]
    found = marked(" ".join(long), " ".join([*long[:150], "cf", *long[150:]])).split()
    assert found[0] == found[-1] == "…"
    assert len(" ".join(found)) < 160
    assert abs(found.index("«cf»") - len(found) / 2) < 3
    assert marked(" ".join(long), " ".join([*long, "cf"])).endswith(" w199 «cf»")


def test_measures_in_words() -> None:
    assert told({"area": 0.0244, "l2": 0.05, "ssim": 0.9}) == "area 2.44 %, RMS 0.050, SSIM 0.900"
    assert told({"changed": 1.0, "tokens": 1.5}) == "changed 100 % of texts, +1.5 words"
    assert told({}) == ""
