"""A grid on a tiny CLIP, images in parquet files and a published expert: down the whole road."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from extras import needs
from PIL import Image
from safetensors.torch import load_file, save_file

from mergesec.errors import UsageError
from mergesec.execution.store import Store
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import Plan, make_plan
from mergesec.planning.resolve import resolve
from mergesec_tasks.vision.clip import Clip

pandas = pytest.importorskip("pandas")
needs("pyarrow")
transformers = needs("transformers")


def square(colour: tuple[int, int, int], row: int) -> bytes:
    stream = io.BytesIO()
    image = Image.new("RGB", (32, 32), colour)
    image.putpixel((row % 32, row // 32 % 32), (255, 255, 255))
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets whose classes differ by colour."""
    root = tmp_path_factory.mktemp("data")
    colours = [(220, 20, 20), (20, 220, 20), (20, 20, 220)]
    for task, names in (
        ("dtd", ["banded", "blotchy", "braided"]),
        ("eurosat", ["AnnualCrop", "Forest", "River"]),
    ):
        (root / task).mkdir()
        (root / task / "classes.json").write_text(json.dumps({"classes": names}))
        for split, rows in (("train", 148), ("test", 30)):
            frame = {
                "image": [square(colours[i % 3], i) for i in range(rows)],
                "label": [i % 3 for i in range(rows)],
            }
            pandas.DataFrame(frame).to_parquet(root / task / f"{split}.parquet")
    return root


@pytest.fixture(scope="module")
def expert(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """A vision tower alone, as FusionBench publishes its experts."""
    folder = tmp_path_factory.mktemp("expert")
    tower = transformers.CLIPVisionModel.from_pretrained(tiny_clip)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(0.01)
    tower.save_pretrained(folder)
    return folder


def fields(model: Path, **suite: Any) -> dict[str, Any]:
    return {
        "name": "tiny-clip",
        "suite": {
            "name": "tiny", "backbone": {"name": "clip", "model": str(model)},
            "tasks": [{"name": "dtd", "size": 32}, {"name": "eurosat", "size": 32}], **suite,
        },
        "axes": {"merging": [{"name": "task_arithmetic", "scaling": 0.5}]},
        "threats": ["clean"],
        "recipe": {"steps": 12, "batch_size": 16, "learning_rate": 1e-3, "augment": "flip"},
    }  # fmt: skip


def plan(raw: dict[str, Any]) -> Plan:
    return make_plan(resolve(parse_grid(raw, "tiny"), load_catalog()), lambda task: "")


def kinds(found: Plan, kind: str) -> set[str]:
    return {key for key, step in found.steps.items() if step.kind == kind}


def test_bench_run_end_to_end(bench: Any, images: Path, tiny_clip: Path, expert: Path) -> None:
    grid = bench.home / "tiny-clip.yaml"
    grid.write_text(yaml.safe_dump(fields(tiny_clip, experts={"eurosat": str(expert)})))
    ran = bench("run", "--grid", str(grid), "--jobs", "1", "--device", "cpu", "--data-root", str(images),
                "--results", str(bench.results))  # fmt: skip
    assert ran.code == 0, ran.err
    store = Store(bench.store)
    found = {
        kind: [key for k, key, _ in store.artifacts() if k == kind] for kind in ("head", "expert", "import")
    }
    assert {kind: len(keys) for kind, keys in found.items()} == {"head": 2, "expert": 1, "import": 1}
    assert all(store.meta("head", key)["info"]["fitted"] is False for key in found["head"])
    assert "partial" in "".join(p.read_text() for p in (bench.results / "leaderboards").rglob("*.md"))
    manifest = json.loads((bench.results / "records" / "tiny-clip" / "grid.json").read_text())
    assert manifest["spec"]["suite"]["backbone"]["model"] == tiny_clip.name
    assert manifest["spec"]["suite"]["experts"] == {"eurosat": expert.name}
    again = bench("run", "--grid", str(grid), "--jobs", "1", "--device", "cpu", "--data-root", str(images),
                  "--results", str(bench.results))  # fmt: skip
    assert "0 steps run" in again.out


def test_a_prompt_beyond_the_context_is_named_before_anything_runs(bench: Any, short_clip: Path) -> None:
    """One token a byte, a start and an end: prompts of mini/cars fit 32, those of mini/gtsrb do not."""
    grid = bench.home / "short.yaml"
    known = {"tasks": ["mini/cars", "mini/gtsrb"]}
    grid.write_text(yaml.safe_dump(fields(short_clip, **known)))
    done = bench("plan", "--grid", str(grid))
    assert done.code == 2 and "Traceback" not in done.err
    message = "suite.backbone.model (mini/gtsrb): the prompt 'a zoomed in photo of a \"speed limit 30\" traffic sign.' has 45"
    assert " ".join(done.err.split()).count(message) == 1, done.err
    assert "the text tower's context has 32; use head: probe" in " ".join(done.err.split())
    folders = {"tasks": [{"name": "dtd", "size": 32}, {"name": "gtsrb", "size": 32}]}
    with pytest.raises(UsageError, match=r"suite\.backbone\.model \(gtsrb\): the prompt '.*' has 33 tokens"):
        plan(fields(short_clip, **folders))  # of a folder's classes only the sentences around them are known
    probe = fields(short_clip, **known)
    probe["suite"]["backbone"]["head"] = "probe"
    assert kinds(plan(probe), "head")


def test_other_weights_never_meet_an_old_head(tiny_clip: Path, tmp_path: Path) -> None:
    model = transformers.CLIPModel.from_pretrained(tiny_clip)
    with torch.no_grad():
        model.text_projection.weight.mul_(1.01)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_clip / name).read_bytes())
    first, second = plan(fields(tiny_clip)), plan(fields(tmp_path))
    assert not kinds(first, "head") & kinds(second, "head")
    assert kinds(first, "data") == kinds(second, "data")


def test_the_place_of_a_model_does_not_matter(tiny_clip: Path, tmp_path: Path) -> None:
    for file in tiny_clip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert plan(fields(tiny_clip)).steps.keys() == plan(fields(tmp_path)).steps.keys()


def test_published_experts_load_under_old_names_and_out_of_whole_clips(
    tiny_clip: Path, expert: Path, tmp_path: Path
) -> None:
    """transformers 4 wrote ``vision_model.`` before every name of a vision tower."""
    subject = Clip(str(tiny_clip), 0, 0, "zero-shot")
    base, wanted = subject.base_weights(), subject.published(str(expert))
    assert wanted.keys() == base.keys()
    assert all(torch.equal(wanted[n], t + 0.01) for n, t in base.items() if t.is_floating_point())
    stored = load_file(expert / "model.safetensors")
    bare = {n.removeprefix("vision_model."): t for n, t in stored.items()}
    for label, names in (("old", {f"vision_model.{n}": t for n, t in bare.items()}), ("new", bare)):
        folder = tmp_path / label
        folder.mkdir()
        (folder / "config.json").write_bytes((expert / "config.json").read_bytes())
        save_file(names, folder / "model.safetensors", {"format": "pt"})
        if label == "new" and transformers.__version__.startswith("4."):
            with pytest.raises(UsageError, match="lacks 55 tensors"):  # its own releases never wrote such
                subject.published(str(folder))
            continue
        found = subject.published(str(folder))
        assert all(torch.equal(found[n], wanted[n]) for n in wanted)
    assert all(torch.equal(t, base[n]) for n, t in subject.published(str(tiny_clip)).items())


def test_published_experts_are_known_by_content(tiny_clip: Path, expert: Path, tmp_path: Path) -> None:
    found = plan(fields(tiny_clip, experts={"eurosat": str(expert)}))
    assert len(kinds(found, "import")) == len(kinds(found, "expert")) == 1
    for file in expert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert kinds(plan(fields(tiny_clip, experts={"eurosat": str(tmp_path)})), "import") == kinds(
        found, "import"
    )
    hub = "tanganke/clip-vit-base-patch32_eurosat@" + "a" * 40
    assert kinds(plan(fields(tiny_clip, experts={"eurosat": hub})), "import") != kinds(found, "import")
    with pytest.raises(UsageError, match=r"suite\.experts\.mnist.*not a task of the suite"):
        plan(fields(tiny_clip, experts={"mnist": str(expert)}))
    with pytest.raises(UsageError, match=r"suite\.experts\.dtd.*owner/name@commit"):
        plan(fields(tiny_clip, experts={"dtd": "tanganke/clip-vit-base-patch32_dtd"}))


def test_recipe_fields_at_their_defaults_change_no_key() -> None:
    raw: dict[str, Any] = {
        "name": "mini", "suite": {"backbone": "mini/vit", "tasks": ["mini/mnist", "mini/svhn"]},
        "axes": {"merging": ["simple_average"]}, "threats": ["clean"],
    }  # fmt: skip
    plain = plan(raw).steps.keys()
    assert plan({**raw, "recipe": {"steps": 0, "augment": "none"}}).steps.keys() == plain
    assert plan({**raw, "recipe": {"steps": 3}}).steps.keys() != plain
