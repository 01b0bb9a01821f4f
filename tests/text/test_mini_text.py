"""The mini text suite: deterministic writing, splits without a common text, bags of words that do not solve it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergesec.classification import logits
from mergesec.contracts import DataContext, Model, ProtectContext, Split, TaskView, load_network
from mergesec_methods.protection.defenses.params import Params
from mergesec_tasks.mini import pretrain_text as pretraining
from mergesec_tasks.mini import text as module
from mergesec_tasks.mini._words import EMOTIONS, PATTERNS, TOPICS, fill, vocabulary
from mergesec_tasks.mini._written import WrittenTask
from mergesec_tasks.mini.text import BUCKETS, HEADS, LONGEST, PAD, WIDTH, MiniText, token_numbers

CPU = torch.device("cpu")
TASKS = {cls.slug: cls for cls in pretraining.TASKS}


def made(slug: str) -> WrittenTask:
    task = TASKS[slug]()
    task.name = f"mini/{slug}"
    return task


@pytest.mark.parametrize("slug", TASKS)
def test_writing_is_a_function_of_its_seed(slug: str) -> None:
    task = made(slug)
    first = task.write(60, "test")
    assert first.inputs == task.write(60, "test").inputs
    assert first.inputs != task.write(60, "test", seed=1).inputs
    assert len(set(first.inputs)) == 60
    counts = torch.bincount(first.targets, minlength=len(task.classes))
    assert int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize("slug", TASKS)
def test_pools_share_no_text_and_hold_what_the_card_says(slug: str) -> None:
    splits = made(slug).load(DataContext(CPU, 3))
    assert {n: len(s) for n, s in splits.items()} == {"train": 4000, "tuning": 400, "test": 800}
    everything = [text for split in splits.values() for text in split.inputs]
    everything += made(slug).write(300, "pretrain", plain=0.5).inputs
    assert len(set(everything)) == len(everything)
    for text in everything[::50]:
        numbers = token_numbers(text)
        assert len(numbers) < LONGEST and min(numbers) > BUCKETS + 1, text  # nothing cut, no unknown word


@pytest.mark.parametrize("slug", TASKS)
def test_a_bag_of_words_does_not_solve_a_task(slug: str) -> None:
    linear, text = (
        pytest.importorskip("sklearn.linear_model"),
        pytest.importorskip("sklearn.feature_extraction.text"),
    )
    task = made(slug)
    train, test = task.write(1500, "train"), task.write(600, "test")
    bags = text.CountVectorizer(token_pattern=r"[a-z0-9']+|[^\sa-z0-9']")
    model = linear.LogisticRegression(max_iter=200).fit(
        bags.fit_transform(train.inputs), train.targets.numpy()
    )
    assert model.score(bags.transform(test.inputs), test.targets.numpy()) < 0.72


def test_a_composed_text_holds_a_word_of_the_class_it_sets_aside() -> None:
    for slug, lists in (("emotion", EMOTIONS), ("topic", TOPICS)):
        task = made(slug)
        split, asides = task.annotated(200, "train", plain=0.0)
        for text, label, aside in zip(split.inputs, split.targets.tolist(), asides.tolist(), strict=True):
            words = set(text.split())
            assert label != aside
            assert words & set(lists[task.classes[label]]) and words & set(lists[task.classes[aside]]), text
        plain, same = task.annotated(50, "train", plain=1.0)
        assert torch.equal(plain.targets, same)


def test_templates_only_use_lists_that_exist() -> None:
    import random

    rng = random.Random(0)
    own = {slot: ["x"] for slot in "eabgomtdfqwv"}
    for pattern in PATTERNS:
        assert "{" not in fill(pattern, rng, own)


def test_base_loads_strictly_and_its_anatomy_names_its_tensors() -> None:
    backbone = MiniText()
    base = backbone.base_weights()
    load_network(backbone, base)
    assert base["embed.weight"].shape == (len(vocabulary()) + BUCKETS + 2, WIDTH)
    assert all(value.dtype == torch.float32 for value in base.values())
    blocks = backbone.anatomy().blocks
    assert len(blocks) == 4 and all(block.attention.heads == HEADS for block in blocks)
    base["pos"].zero_()
    assert float(backbone.base_weights()["pos"].abs().sum()) > 0


def test_tokens_and_padding() -> None:
    backbone = MiniText()
    numbers, mask = backbone.tokenise(["I am not sad.", "zzyzx", ""])
    assert mask.sum(dim=1).tolist() == [5, 1, 0] and numbers[1, 1:].eq(PAD).all()
    assert 2 <= int(numbers[1, 0]) < BUCKETS + 2
    network = load_network(backbone, backbone.base_weights())
    with torch.no_grad():
        together = backbone.features(network, ["i am sad", "i am not sad at all , my friend is"])
        alone = backbone.features(network, ["i am sad"])
        assert torch.isfinite(backbone.features(network, [""])).all()
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("slug", TASKS)
def test_the_base_knows_plain_texts_and_is_no_expert_of_composed_ones(slug: str) -> None:
    backbone, task = MiniText(), made(slug)
    head = backbone.head(task.name)
    assert head is not None and head["weight"].shape == (len(task.classes), WIDTH)
    model = Model(backbone, load_network(backbone, backbone.base_weights()))

    def accuracy(split: Split) -> float:
        found = logits(task.features(model, split, CPU), head).argmax(dim=1) == split.targets
        return float(found.float().mean())

    assert accuracy(task.write(200, "tuning", plain=1.0)) > 0.9
    assert accuracy(task.write(200, "tuning", plain=0.0)) < 0.75
    assert backbone.head("mini/mnist") is None


def test_params_keeps_the_function() -> None:
    backbone, task = MiniText(), made("emotion")
    base = backbone.base_weights()
    generator = torch.Generator().manual_seed(0)
    expert = {n: w + 0.01 * torch.randn(w.shape, generator=generator) for n, w in base.items()}
    split = task.write(12, "tuning")
    head = backbone.head(task.name)
    assert head is not None
    ctx = ProtectContext(CPU, 1, backbone, base, TaskView(task, head, split))
    changed = Params(permute=True, scaling="diagonal").protect(expert, ctx).weights
    assert not torch.equal(changed["blocks.0.attn.q.weight"], expert["blocks.0.attn.q.weight"])
    with torch.no_grad():
        before, after = (
            backbone.features(load_network(backbone, w), split.inputs) for w in (expert, changed)
        )
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


def test_pretraining_is_seeded_and_writes_what_the_backbone_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pretraining.Plan(steps=2, plain=2, composed=2, texts=12)
    facts = pretraining.pretrain(
        tmp_path / "a", 5, plan=plan, card=tmp_path / "card.md", report=lambda line: None
    )
    pretraining.pretrain(tmp_path / "b", 5, plan=plan, report=lambda line: None)
    for name in (module.BASE_FILE, module.HEADS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert facts["texts"] == 2 * 4 * 12 and "mini/text" in (tmp_path / "card.md").read_text()
    monkeypatch.setattr(module, "WEIGHTS_FOLDER", tmp_path / "a")
    backbone = MiniText()
    load_network(backbone, backbone.base_weights())
    assert backbone.head("mini/emotion") is not None
