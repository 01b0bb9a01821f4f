"""The small CLIP that ships: one network in two layouts, words that are its own, and folders that do not go together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import needs
from safetensors.torch import load_file, save_file

from mergesec.contracts import ContractError, load_network
from mergesec.errors import UsageError
from mergesec.execution.session import open_session
from mergesec.planning.catalog import load_catalog
from mergesec.planning.refs import packaged
from mergesec_methods.backdoor.attacks._shadow import NAMES, SENTENCES, shadow_head
from mergesec_tasks.mini_clip import pretrain as pretraining
from mergesec_tasks.mini_clip._words import PIECES, save_words, vocabulary, words_of
from mergesec_tasks.vision.clip import Clip
from mergesec_tasks.vision.open_clip import OpenClip

needs("transformers")
needs("open_clip")

CPU = torch.device("cpu")
FOLDERS = {"clip": "mergesec_tasks:mini_clip/transformers", "open-clip": "mergesec_tasks:mini_clip/open_clip"}
TASKS = {task.slug: task for task in pretraining.TASKS}


def shipped(layout: str) -> Path:
    return Path(packaged("model", FOLDERS[layout]))


def prompts(slug: str) -> list[list[str]]:
    """As the engine writes them: the card's templates with the task's names."""
    card = load_catalog().get("task", f"mini/{slug}").card
    assert card.templates
    return TASKS[slug]().prompts(card.templates)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip(str(shipped("clip")), 0, 0, "zero-shot")


@pytest.fixture(scope="module")
def network(clip: Clip) -> Any:
    return load_network(clip, clip.base_weights())


def open_clip_of(folder: Path) -> OpenClip:
    return OpenClip(str(folder), "", 0, 0, "zero-shot")


def copied(layout: str, home: Path) -> Path:
    return Path(shutil.copytree(shipped(layout), home / layout))


# --------------------------------------------------------------------------- one network


def test_both_layouts_are_one_network(clip: Clip, network: Any) -> None:
    other = open_clip_of(shipped("open-clip"))
    images = TASKS["cars"]().render(24, "tuning").inputs.float() / 255
    with torch.no_grad():
        ours = clip.features(network, images)
        theirs = other.features(load_network(other, other.base_weights()), images)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    heads = [backbone.zero_shot(prompts("gtsrb"), CPU) for backbone in (clip, other)]
    assert heads[0] is not None and heads[1] is not None
    torch.testing.assert_close(heads[1]["weight"], heads[0]["weight"], rtol=0, atol=1e-5)
    torch.testing.assert_close(heads[1]["scale"], heads[0]["scale"])
    assert len(other.anatomy().blocks) == len(clip.anatomy().blocks) == 6


def test_open_clip_reads_the_release_by_itself(clip: Clip, network: Any) -> None:
    import open_clip

    place = f"local-dir:{shipped('open-clip')}"
    whole = open_clip.create_model(place).eval()
    sentences = ["a photo of a beach.", "an aerial photo of a tennis court."]
    images = TASKS["sun397"]().render(4, "tuning").inputs.float() / 255
    with torch.no_grad():
        seen = whole.encode_image((images - 0.5) / 0.25)
        said = whole.encode_text(open_clip.get_tokenizer(place)(sentences))
        torch.testing.assert_close(clip.features(network, images), seen, rtol=0, atol=1e-5)
    head = clip.zero_shot([[text] for text in sentences], CPU)
    assert head is not None
    unit = torch.nn.functional.normalize(said, dim=-1)
    torch.testing.assert_close(head["weight"], unit, rtol=0, atol=1e-5)


def test_the_base_knows_the_tasks_by_half(clip: Clip, network: Any) -> None:
    """Of 100 tuning images a task, 800 in all: chance alone moves the mean by 1.8 points (one deviation); bounds are
    three of them beyond the 40 to 60 that the suite asks for."""
    right = 0
    for slug, task in TASKS.items():
        split = task().load(None)["tuning"] if slug == "mnist" else task().render(100, "tuning")  # type: ignore[arg-type]
        head = clip.zero_shot(prompts(slug), CPU)
        assert head is not None
        with torch.no_grad():
            seen = clip.features(network, split.inputs[:100].float() / 255)
        unit = torch.nn.functional.normalize(seen, dim=-1)
        right += int(((unit @ head["weight"].T).argmax(1) == split.targets[:100]).sum())
    assert 0.40 - 0.054 < right / 800 < 0.60 + 0.054


# --------------------------------------------------------------------------- words


def test_every_prompt_is_made_of_whole_words(clip: Clip) -> None:
    tokenizer, tower = clip._text_tower()
    said = [text for slug in TASKS for texts in prompts(slug) for text in texts]
    said += [sentence.format(name) for name in NAMES for sentence in SENTENCES]
    numbers = tokenizer(said)["input_ids"]
    assert [len(own) - 2 for own in numbers] == [len(PIECES.findall(text.lower())) for text in said]
    assert max(map(len, numbers)) <= tower.config.max_position_embeddings


def test_no_word_changes_what_an_earlier_one_became() -> None:
    words = words_of(["wood woods woodland land and sand 30 signs"])
    for count in range(1, len(words) + 1):
        found = vocabulary(words[:count])
        assert all(f"{word}</w>" in found.vocabulary for word in words[:count])
        assert found.merges == vocabulary(words).merges[: len(found.merges)]


def test_a_shadow_head_from_text_begins_with_the_targets_name(clip: Clip) -> None:
    class Told:
        backbone, device, target_name = clip, CPU, "river"

    head = shadow_head(Told(), text=True)  # type: ignore[arg-type]
    alone = clip.zero_shot([[sentence.format("river") for sentence in SENTENCES]], CPU)
    assert alone is not None
    assert head["weight"].shape == (1 + len(NAMES), 64)
    torch.testing.assert_close(head["weight"][0], alone["weight"][0], rtol=0, atol=1e-5)
    Told.backbone = Clip(str(shipped("clip")), 0, 0, "probe")
    with pytest.raises(ContractError, match="needs a base with a text tower"):
        shadow_head(Told(), text=True)  # type: ignore[arg-type]


# --------------------------------------------------------------------------- what does not go together


def test_a_prompt_beyond_the_context_is_named(clip: Clip) -> None:
    long = "a photo of a " + "very " * 30 + "long train."
    for backbone in (clip, open_clip_of(shipped("open-clip"))):
        with pytest.raises(
            UsageError, match=r"the prompt 'a photo of a very .* has 39 tokens, .*context has 32"
        ):
            backbone.zero_shot([["a beach."], ["a photo of it.", long]], CPU)


def other_words(folder: Path) -> None:
    """The tokenizer of a CLIP with fewer words."""
    save_words(vocabulary(["beach", "forest"]), folder)


def more_words(folder: Path) -> None:
    """The tokenizer of a CLIP with more words."""
    save_words(vocabulary([f"word{chr(97 + n)}{chr(97 + m)}s" for n in range(26) for m in range(26)]), folder)


def other_tower(folder: Path) -> None:
    """A text projection of another width, as another CLIP's text tower comes with."""
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(n for n in tensors if n.startswith("text_projection"))
    tensors[name] = torch.ones(48, 48)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("layout", ["clip", "open-clip"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_words, "the end token has the number .*another CLIP's"),
        (more_words, "has the number .* vocab_size of"),
        (other_tower, "takes features of width 48, the text tower has 64: it is another CLIP's"),
    ],
)
def test_towers_that_were_not_trained_together_end_the_plan(
    layout: str, change: Callable[[Path], None], told: str, tmp_path: Path
) -> None:
    folder = copied(layout, tmp_path)
    change(folder)
    words = [f"suite.backbone.name={layout}", f"suite.backbone.model={folder}"]
    with pytest.raises(UsageError, match=rf"suite\.backbone\.model.*{told}"):
        open_session("mini-clip-smoke", words)


@pytest.mark.parametrize("name", ["vocab_size", "context_length", "width"])
def test_sizes_of_a_release_are_numbers(name: str, tmp_path: Path) -> None:
    folder = copied("open-clip", tmp_path)
    told = json.loads((folder / "open_clip_config.json").read_text())
    told["model_cfg"]["text_cfg"][name] = "64"
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    words = ["suite.backbone.name=open-clip", f"suite.backbone.model={folder}"]
    with pytest.raises(
        UsageError, match=rf"^suite\.backbone\.model: .*text_cfg: {name} is '64'; expected a whole"
    ):
        open_session("mini-clip-smoke", words)


def test_an_open_clip_release_without_its_tokenizer(tmp_path: Path) -> None:
    folder = copied("open-clip", tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"no tokenizer\.json"):
        open_clip_of(folder).zero_shot([["a beach."]], CPU)
    told = json.loads((folder / "open_clip_config.json").read_text())
    del told["model_cfg"]["text_cfg"]["hf_tokenizer_name"]
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    with pytest.raises(UsageError, match=r"vocab_size of \d+, open_clip's tokenizer 49408 words"):
        open_clip_of(folder).zero_shot([["a beach."]], CPU)


def test_the_command_ends_with_code_2(bench: Any, tmp_path: Path) -> None:
    folder = copied("clip", tmp_path)
    other_words(folder)
    ran = bench("plan", "--grid", "mini-clip-smoke", f"suite.backbone.model={folder}")
    assert (ran.code, "Traceback" in ran.err) == (2, False)
    ran = bench(
        "plan", "--grid", "mini-clip-smoke", "suite.backbone.model=mergesec_tasks:mini_clip/transformer"
    )
    assert ran.code == 2 and "has no 'mini_clip/transformer'" in ran.err


# --------------------------------------------------------------------------- how it is made


def test_pretraining_makes_the_same_files_again(tmp_path: Path) -> None:
    phases = tuple(phase._replace(steps=2, shares=(2,) * 13) for phase in pretraining.PHASES)
    for name in ("first", "second"):
        card = tmp_path / name / "card.md"
        card.parent.mkdir()
        facts = pretraining.pretrain(
            tmp_path / name, 3, phases=phases, images=16, card=card, report=lambda line: None
        )
        assert f"{facts['parameters']:,}" in card.read_text()
    for layout, file in (("transformers", "model"), ("open_clip", "open_clip_model")):
        first, second = (tmp_path / n / layout / f"{file}.safetensors" for n in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
    subject = Clip(str(tmp_path / "first" / "transformers"), 0, 0, "zero-shot")
    assert subject.zero_shot([["a beach."], ["a forest."]], CPU) is not None


@pytest.mark.slow
def test_the_smoke_grid_aims_off_task_by_text(bench: Any) -> None:
    ran = bench("run", "--grid", "mini-clip-smoke", "threats=[backdoor]", "recipe.steps=4", "axes.victim=[mini/gtsrb]",
                "suite.tasks=[mini/gtsrb,mini/eurosat]", "--jobs", "1", "--device", "cpu", "--results",
                str(bench.results))  # fmt: skip
    assert ran.code == 0, ran.err
    board = (bench.results / "leaderboards" / "mini-clip-smoke" / "boards.md").read_text()
    assert "shadow=text" in board and "mini/eurosat" in board
