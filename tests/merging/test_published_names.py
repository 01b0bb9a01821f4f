"""A body under other names: published networks are merged into their base as grids read them, with or without heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergesec
from mergesec.errors import UsageError
from mergesec.planning.catalog import load_catalog
from mergesec.streaming.merging import Written, merge_files
from mergesec.streaming.reading import open_weights
from mergesec.tensorwise import TensorwiseMerge
from mergesec.weights import Fit, fit_names

Install = Callable[[str], Any]
TWO = ("layers.0.weight", "layers.1.weight")


def fit(base: tuple[str, ...], other: tuple[str, ...]) -> Fit | None:
    return fit_names(dict.fromkeys(base, (2,)), dict.fromkeys(other, (2,)))


def under(prefix: str, *more: str) -> tuple[str, ...]:
    return (*(prefix + name for name in TWO), *more)


@pytest.mark.parametrize("prefix", ["vit.", "bert.", "model.", "model.language_model."])
def test_a_body_alone_and_within_a_network(prefix: str) -> None:
    inside = under(prefix, "classifier.weight", "lm_head.weight", "strange")
    found = fit((*TWO, "pooler.weight"), inside)
    assert found is not None
    assert found.names == {name: prefix + name for name in TWO}
    assert (found.kept, found.left) == (["pooler.weight"], ["classifier.weight", "lm_head.weight", "strange"])
    found = fit(inside, (*TWO, "pooler.weight"))
    assert found is not None
    assert found.names == {prefix + name: name for name in TWO}
    assert (found.kept, found.left) == (["classifier.weight", "lm_head.weight", "strange"], ["pooler.weight"])


def test_what_belongs_to_a_task_may_differ() -> None:
    found = fit(
        under("bert.", "cls.predictions.bias"),
        under("bert.", "classifier.weight", "bert.pooler.dense.weight"),
    )
    assert found is not None
    assert found.kept == ["cls.predictions.bias"]
    assert found.left == ["classifier.weight", "bert.pooler.dense.weight"]


def test_heads_of_another_size_are_left_out_and_equal_ones_merged() -> None:
    base, same, other = ({"a": (2,), "classifier.weight": (size, 2)} for size in (3, 3, 5))
    found = fit_names(base, same)
    assert found is not None
    assert found.names == {"a": "a", "classifier.weight": "classifier.weight"}
    found = fit_names(base, other)
    assert found is not None
    assert (found.kept, found.left) == (["classifier.weight"], ["classifier.weight"])


def test_what_is_computed_may_be_stored_or_not() -> None:
    found = fit((*TWO, "embeddings.position_ids"), (*TWO, "layers.0.rotary_emb.inv_freq"))
    assert found is not None
    assert (found.kept, found.left) == (["embeddings.position_ids"], ["layers.0.rotary_emb.inv_freq"])


def test_old_names_of_norms() -> None:
    found = fit(("x.LayerNorm.gamma", "x.LayerNorm.beta"), ("m.x.LayerNorm.weight", "m.x.LayerNorm.bias"))
    assert found is not None
    assert found.names == {
        "x.LayerNorm.gamma": "m.x.LayerNorm.weight",
        "x.LayerNorm.beta": "m.x.LayerNorm.bias",
    }
    assert (
        fit(("x.LayerNorm.gamma",), ("x.LayerNorm.weight", "x.LayerNorm.gamma")) is None
    )  # one tensor twice


@pytest.mark.parametrize(
    ("base", "other"),
    [
        (TWO, (*TWO, "head")),  # no known part of a task
        (TWO, under("vit.", "vit.layers.2.weight")),  # a deeper network
        (TWO, ("vit.layers.0.weight",)),  # a shallower one
        (TWO, (*under("model."), *under("ema."))),  # which one?
        (TWO, ("layers.0.weight", "vit.layers.1.weight")),
        (under("vit."), under("bert.")),
        (under("model.", "lm_head.weight"), under("model.")),  # embeddings are its last map
        (under("model."), under("model.", "lm_head.weight")),
        (under("model.", "model.layers.2.weight"), TWO),
        (TWO, ()),
        (TWO, ("elsewhere",)),
    ],
)
def test_other_networks_do_not_fit(base: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert fit(base, other) is None


# --------------------------------------------------------------------------- networks of transformers


def tiny(transformers: Any, kind: str, **more: Any) -> Any:
    """A config of a network of a few thousand weights."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    own = {
        "vit": {"image_size": 8, "patch_size": 4}, "bert": {"vocab_size": 20, "max_position_embeddings": 9},
        "gpt2": {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 0}, "llama": {"vocab_size": 20},
        "clip_vision_model": {"image_size": 8, "patch_size": 4}, "clip": {},
    }  # fmt: skip
    named = {"n_embd": 8, "n_layer": 2, "n_head": 2} if kind == "gpt2" else sizes
    if kind == "clip":
        more["vision_config"] = {**sizes, "image_size": 8, "patch_size": 4}
        more["text_config"] = {**sizes, "vocab_size": 20, "max_position_embeddings": 9}
        named = {"projection_dim": 8}
    return transformers.AutoConfig.for_model(kind, **{**named, **own[kind], **more})


def published(folder: Path, network: Any) -> Path:
    """The network with weights of its own, as transformers saves it."""
    generator = torch.Generator().manual_seed(len(folder.name) + ord(folder.name[0]))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    network.save_pretrained(folder)
    return folder


def averaged(base: Path, experts: list[Path], out: Path) -> Written:
    entry = load_catalog().get("merging", "simple_average")
    made = entry.create(entry.card.bind("simple_average", {}))
    assert isinstance(made, TensorwiseMerge)
    named = {path.name: open_weights(path, path.name) for path in experts}
    return merge_files(made, open_weights(base, "base"), named, out)


@pytest.mark.parametrize(
    ("kind", "base", "expert"),
    [
        ("vit", "ViTModel", "ViTForImageClassification"), ("vit", "ViTForImageClassification", "ViTModel"),
        ("bert", "BertForPreTraining", "BertForSequenceClassification"), ("bert", "BertModel", "BertForSequenceClassification"),
        ("gpt2", "GPT2Model", "GPT2ForSequenceClassification"), ("gpt2", "GPT2LMHeadModel", "GPT2Model"),
        ("llama", "LlamaModel", "LlamaForCausalLM"), ("llama", "LlamaForCausalLM", "LlamaModel"),
    ],
)  # fmt: skip
def test_published_networks_are_merged_by_body(
    kind: str, base: str, expert: str, installed: Install, tmp_path: Path
) -> None:
    """The merged folder's body is the average of the bodies that transformers loads from the experts' folders."""
    transformers = installed("transformers")
    paths = []
    for name, cls, labels in (("base", base, 2), ("cars", expert, 3), ("sun", expert, 4)):
        paths.append(
            published(
                tmp_path / name, getattr(transformers, cls)(tiny(transformers, kind, num_labels=labels))
            )
        )
    written = averaged(paths[0], paths[1:], tmp_path / "merged")
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(
        load_file(paths[0] / "model.safetensors")
    )
    (tmp_path / "merged" / "config.json").write_text((paths[0] / "config.json").read_text())
    bodies = [
        transformers.AutoModel.from_pretrained(p).state_dict() for p in (tmp_path / "merged", *paths[1:])
    ]
    compared = [name for name in bodies[0] if "pooler" not in name]
    assert len(compared) > 15
    for name in compared:
        torch.testing.assert_close(bodies[0][name], (bodies[1][name] + bodies[2][name]) / 2)
    tied = base == "GPT2LMHeadModel"  # then nothing lies beside the body
    assert [line.partition(":")[0] for line in written.told] == (
        [] if tied else ["expert 'cars'", "expert 'sun'"]
    )


@pytest.mark.parametrize(
    ("field", "value", "fits"),
    [
        ("num_attention_heads", 4, False), ("layer_norm_eps", 1e-3, False), ("hidden_act", "relu", False),
        ("hidden_dropout_prob", 0.3, True), ("id2label", {0: "x", 1: "y"}, True), ("use_cache", False, True),
        ("pad_token_id", 3, True), ("initializer_range", 0.5, True),
    ],
)  # fmt: skip
def test_configs_that_make_another_function_of_the_same_weights(
    field: str, value: Any, fits: bool, installed: Install, tmp_path: Path
) -> None:
    transformers = installed("transformers")
    base = published(tmp_path / "base", transformers.BertModel(tiny(transformers, "bert")))
    network = transformers.BertForSequenceClassification(tiny(transformers, "bert", **{field: value}))
    expert = published(tmp_path / "expert", network)
    if fits:
        averaged(base, [expert], tmp_path / "merged")
        return
    with pytest.raises(UsageError, match=f"{field} in its config.json is {value!r}, in the base's "):
        averaged(base, [expert], tmp_path / "merged")


def test_the_tower_of_a_clip(installed: Install, tmp_path: Path) -> None:
    """The published experts of the eight tasks are towers, their base is a whole CLIP; or the other way round."""
    transformers = installed("transformers")
    whole = published(tmp_path / "whole", transformers.CLIPModel(tiny(transformers, "clip")))
    tower = published(
        tmp_path / "tower", transformers.CLIPVisionModel(tiny(transformers, "clip_vision_model"))
    )
    stored = load_file(tower / "model.safetensors")
    old = tmp_path / "old"  # how release 4 of transformers names a tower
    old.mkdir()
    save_file({f"vision_model.{name}": t.clone() for name, t in stored.items()}, old / "model.safetensors")
    (old / "config.json").write_text((tower / "config.json").read_text())
    both, start = load_file(whole / "model.safetensors"), "vision_model."
    visual = {n.removeprefix(start): t for n, t in both.items() if n.startswith(start)}
    bodies = {whole: visual, tower: stored, old: stored}
    for base, expert in (
        (whole, tower),
        (whole, old),
        (tower, whole),
        (old, whole),
        (tower, old),
        (old, tower),
    ):
        out = tmp_path / f"{expert.name}_on_{base.name}"
        assert bool(averaged(base, [expert], out).told) == (whole in (base, expert))
        merged = load_file(out / "model.safetensors")
        assert set(merged) == set(load_file(base / "model.safetensors"))
        for name, tensor in merged.items():
            inside = name.removeprefix(start)
            wanted = bodies[expert][inside] if inside in stored else both[name]
            torch.testing.assert_close(tensor, wanted)
    other = tiny(transformers, "clip_vision_model", num_attention_heads=4)
    strange = published(tmp_path / "strange", transformers.CLIPVisionModel(other))
    with pytest.raises(UsageError, match=r"num_attention_heads in its config.json is 4"):
        averaged(whole, [strange], tmp_path / "no")


def test_heads_left_out_are_told(tmp_path: Path) -> None:
    body = {name: torch.ones(2) for name in TWO}
    save_file({**body, "pooler.weight": torch.ones(3)}, tmp_path / "base.safetensors")
    heads = {f"classifier.{i}": torch.ones(1) for i in range(5)}
    save_file({f"vit.{n}": t + 1 for n, t in body.items()} | heads, tmp_path / "x.safetensors")
    written = averaged(
        tmp_path / "base.safetensors", [tmp_path / "x.safetensors"], tmp_path / "out.safetensors"
    )
    assert written.told == [
        "expert 'x.safetensors': left out classifier.0, classifier.1, classifier.2, ... (5 tensors); "
        "of the base stays as it is: pooler.weight"
    ]
    merged = load_file(tmp_path / "out.safetensors")
    assert torch.equal(merged["layers.0.weight"], torch.full((2,), 2.0))
    assert torch.equal(merged["pooler.weight"], torch.ones(3))


def test_python_reads_them_alike(tmp_path: Path) -> None:
    """Files given to ``mergesec.merge`` go through the same rule, written or not."""
    save_file({name: torch.zeros(2) for name in TWO}, tmp_path / "base.safetensors")
    save_file({f"vit.{name}": torch.ones(2) for name in TWO}, tmp_path / "x.safetensors")
    base, experts = tmp_path / "base.safetensors", {"x": tmp_path / "x.safetensors"}
    merged = mergesec.merge(base, experts, "simple_average")
    assert {name: tensor.tolist() for name, tensor in merged.items()} == {name: [1.0, 1.0] for name in TWO}
    assert mergesec.merge(base, experts, "simple_average", out=tmp_path / "out.safetensors") == {}
    assert torch.equal(load_file(tmp_path / "out.safetensors")[TWO[0]], torch.ones(2))
    save_file({f"vit.{name}": torch.ones(2) for name in TWO[:1]}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r"'layers.0.weight' of the base is missing"):
        mergesec.merge(base, experts, "simple_average")
