"""Which files ``bench merge`` takes for a network's weights: transformers' choice among them, and nothing that only
stands for weights. Each refusal names the file and what to do."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergesec.errors import UsageError
from mergesec.planning.catalog import load_catalog
from mergesec.streaming import writing
from mergesec.streaming.mapped import LazyWeights
from mergesec.streaming.merging import merge_files
from mergesec.streaming.reading import open_weights
from mergesec.tensorwise import TensorwiseMerge

Tensors = dict[str, torch.Tensor]
SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PLAIN: Tensors = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(2), "position_ids": torch.arange(3)}


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        open_weights(path, "--expert x")
    assert caught.value.field == "--expert x"
    assert len(str(caught.value)) < 2000
    return caught.value.message


def average() -> TensorwiseMerge:
    entry = load_catalog().get("merging", "simple_average")
    made = entry.create(entry.card.bind("simple_average", {}))
    assert isinstance(made, TensorwiseMerge)
    return made


def saved(path: Path, tensors: Tensors) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def sharded(folder: Path, tensors: Tensors) -> dict[str, Any]:
    """One file a tensor, and the index; what the index says."""
    listed = {name: f"model-0000{i}-of-00009.safetensors" for i, name in enumerate(tensors, 1)}
    for name, file in listed.items():
        saved(folder / file, {name: tensors[name]})
    index = {"metadata": {"total_size": 1}, "weight_map": listed}
    (folder / INDEX).write_text(json.dumps(index))
    return index


# --------------------------------------------------------------------------- adapters


def lora(tmp_path: Path) -> Path:
    factors = {
        "base_model.model.a.lora_A.weight": torch.ones(1, 3),
        "base_model.model.a.lora_B.weight": torch.ones(2, 1),
    }
    saved(tmp_path / "adapter" / "adapter_model.safetensors", factors)
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return tmp_path / "adapter"


def test_an_adapter_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """Averages of A and of B are no average of B A."""
    folder = lora(tmp_path)
    for path in (folder, folder / "adapter_model.safetensors"):
        message = refused(path)
        assert "adapter_config.json" in message
        assert "merge_and_unload" in message
    saved(folder / SINGLE, PLAIN)  # transformers puts the adapter on top of what lies beside it
    assert "adapter" in refused(folder)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.a.lora_A.weight", "a.lora_B.default.weight", "a.lora_magnitude_vector", "a.lora_embedding_A",
        "lora_unet_down.lora_up.weight", "a.to_q_lora.down.weight", "a.hada_w1_a", "a.lokr_w2_b", "a.oft_r", "a.ia3_l",
        "prompt_embeddings", "base_model.model.a.bias", "a.vera_lambda_b",
    ],
)  # fmt: skip
def test_parts_of_adapters_are_known_by_name(name: str, tmp_path: Path) -> None:
    message = refused(saved(tmp_path / "x.safetensors", {**PLAIN, name: torch.ones(2)}))
    assert name in message
    assert "merge the adapter into its base first" in message


# --------------------------------------------------------------------------- codes

INT8, UINT8, INT32 = torch.int8, torch.uint8, torch.int32


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.weight": torch.ones(2, 3, dtype=INT8), "a.SCB": torch.ones(2)},
        {"a.SCB": torch.ones(2)},
        {"a.weight": torch.ones(2, 3, dtype=UINT8)},
        {"a.weight": torch.ones(2, 3).to(torch.float8_e4m3fn)},
        {"b.weight": torch.ones(2, 3).to(torch.float8_e5m2), "b.weight_scale_inv": torch.ones(1)},
        {"a.weight_scale": torch.ones(1)},
        {"a.input_scale": torch.ones(1)},
        {"a.qweight": torch.ones(2, 3, dtype=INT32)},
        {"a.qzeros": torch.ones(2, 3, dtype=INT32)},
        {"a.weight.quant_state.bitsandbytes__nf4": torch.ones(3, dtype=UINT8)},
        {"a.weight.absmax": torch.ones(3)},
        {"a.weight_packed": torch.ones(3, dtype=INT32)},
        {"mlp.experts.gate_up_proj_blocks": torch.ones(3, dtype=UINT8)},
        {"a.weight._data": torch.ones(3, dtype=INT8)},
        {"a.W_q": torch.ones(3, dtype=UINT8)},
    ],
    ids=lambda tensors: next(iter(tensors)),
)
def test_codes_are_refused(tensors: Tensors, tmp_path: Path) -> None:
    message = refused(saved(tmp_path / "x.safetensors", {**PLAIN, **tensors}))
    assert (
        "x.safetensors: tensor 'a." in message or "x.safetensors: tensor 'b." in message or "mlp." in message
    )
    assert "dequantize" in message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (CONFIG, '{"quantization_config": {"quant_method": "gptq", "bits": 4}}'),
        (CONFIG, '{"text_config": {"quantization_config": {"quant_method": "fp8"}}}'),
        (CONFIG, '{"compression_config": {"format": "int-quantized"}}'),
        ("quantize_config.json", "{}"),
        ("quant_config.json", "{}"),
        ("hf_quant_config.json", "{}"),
    ],
)
def test_a_folder_that_says_it_is_quantised_is_refused(name: str, text: str, tmp_path: Path) -> None:
    saved(tmp_path / SINGLE, PLAIN)
    (tmp_path / name).write_text(text)
    assert "dequantize" in refused(tmp_path)
    assert name in refused(tmp_path / SINGLE)


def test_weights_of_networks_are_not_taken_for_codes(tmp_path: Path) -> None:
    """Scales, counters and masks that networks have of their own."""
    own = {
        "logit_scale": torch.ones(()), "layer_scale1.lambda1": torch.ones(2), "norm.scale": torch.ones(2),
        "bn.num_batches_tracked": torch.tensor(7), "h.0.attn.bias": torch.ones(2, 2, dtype=torch.bool), "scales": torch.ones(2),
        "explorations.weight": torch.ones(2), "half.weight": torch.ones(2).half(), "double": torch.ones(2).double(),
    }  # fmt: skip
    saved(tmp_path / SINGLE, own)
    (tmp_path / CONFIG).write_text('{"quantization_config": null, "model_type": "vit"}')
    assert set(open_weights(tmp_path, "--base")) == set(own)


def test_integers_that_differ_are_not_lost_silently(tmp_path: Path) -> None:
    """A merge keeps the base's integers: codes under any name would be thrown away. Counters of batches may differ."""
    base = {"a": torch.ones(2), "table": torch.arange(4), "bn.num_batches_tracked": torch.tensor(1)}
    saved(tmp_path / "base.safetensors", base)
    saved(tmp_path / "good.safetensors", {**base, "bn.num_batches_tracked": torch.tensor(9)})
    saved(tmp_path / "bad.safetensors", {**base, "table": torch.arange(4) + 1})
    opened = {name: open_weights(tmp_path / f"{name}.safetensors", name) for name in ("base", "good", "bad")}
    merge_files(average(), opened["base"], {"x": opened["good"]}, tmp_path / "out.safetensors")
    with pytest.raises(
        UsageError, match=r"bad.safetensors\): tensor 'table' \(int64\) differs from the base's"
    ):
        merge_files(average(), opened["base"], {"x": opened["bad"]}, tmp_path / "no.safetensors")


@pytest.mark.parametrize("role", ["base", "x"])
@pytest.mark.parametrize("method", ["simple_average", "ties", "tsv_m"])
def test_what_is_not_finite_is_found_in_its_file(method: str, role: str, tmp_path: Path) -> None:
    from mergesec.contracts import ContractError

    for name in ("base", "x"):
        tensors = {"a": torch.ones(4, 4), "b": torch.eye(5) + (name == "x")}
        if name == role:
            tensors["b"][2, 2] = torch.inf
        saved(tmp_path / f"{name}.safetensors", tensors)
    entry = load_catalog().get("merging", method)
    opened = {name: open_weights(tmp_path / f"{name}.safetensors", name) for name in ("base", "x")}
    with pytest.raises(
        ContractError, match=rf"{role} \(.*{role}.safetensors\): tensor 'b' has values that are not finite"
    ):
        merge_files(
            entry.create(entry.card.bind(method, {})),
            opened["base"],
            {"x": opened["x"], "y": opened["x"]},
            tmp_path / "o",
        )


# --------------------------------------------------------------------------- the order of transformers


def test_the_single_file_goes_before_the_index(tmp_path: Path) -> None:
    """As in transformers; and since one of them is stale where they differ, that is said."""
    sharded(tmp_path, PLAIN)
    assert len({e.file for e in open_weights(tmp_path, "--base").extents.values()}) == 3
    saved(tmp_path / SINGLE, PLAIN)
    assert {e.file.name for e in open_weights(tmp_path, "--base").extents.values()} == {SINGLE}
    saved(tmp_path / SINGLE, {**PLAIN, "a.bias": torch.ones(2)})
    message = refused(tmp_path)
    assert "tensor 'a.bias' differs" in message
    assert "model.safetensors, which transformers loads" in message
    assert set(open_weights(tmp_path / SINGLE, "--base")) == set(PLAIN)
    assert torch.equal(open_weights(tmp_path / INDEX, "--base")["a.bias"], PLAIN["a.bias"])
    saved(tmp_path / SINGLE, {n: t for n, t in PLAIN.items() if n != "a.bias"})
    assert "'a.bias' is in one of them only" in refused(tmp_path)
    (tmp_path / "model-00001-of-00009.safetensors").unlink()
    assert "is not beside it" in refused(tmp_path)


def test_the_file_that_a_config_names_goes_first(tmp_path: Path) -> None:
    saved(tmp_path / SINGLE, PLAIN)
    saved(tmp_path / "other.safetensors", {"other": torch.ones(1)})
    (tmp_path / CONFIG).write_text('{"transformers_weights": "other.safetensors"}')
    assert list(open_weights(tmp_path, "--base")) == ["other"]
    (tmp_path / CONFIG).write_text('{"transformers_weights": "../other.safetensors"}')
    assert "transformers_weights names '../other.safetensors'" in refused(tmp_path)


def test_a_folder_without_either_name(tmp_path: Path) -> None:
    saved(tmp_path / "cars.safetensors", PLAIN)
    assert set(open_weights(tmp_path, "--base")) == set(PLAIN)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")  # what transformers would load
    assert "name the file: cars.safetensors" in refused(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    saved(tmp_path / "boats.safetensors", PLAIN)
    assert "name the file: boats.safetensors, cars.safetensors" in refused(tmp_path)


# --------------------------------------------------------------------------- indexes


@pytest.mark.parametrize(
    "shard",
    ["s" * 300, "s" * 300 + ".safetensors", "../x.safetensors", "sub/x.safetensors", "", ".", INDEX, "a\x00.safetensors",
     "a\nb.safetensors", "\x1b[2J.safetensors", "\ud800.safetensors", "pipe.safetensors", "endless.safetensors",
     "loop.safetensors", "folder.safetensors", "pytorch_model.bin", None, 7, ["a"]],
    ids=repr,
)  # fmt: skip
def test_a_shard_is_a_file_beside_its_index(shard: Any, tmp_path: Path) -> None:
    index = sharded(tmp_path, PLAIN)
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "endless.safetensors").symlink_to("/dev/zero")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    index["weight_map"]["a.bias"] = shard
    (tmp_path / INDEX).write_text(json.dumps(index))
    for path in (tmp_path, tmp_path / INDEX):
        message = refused(path)
        assert INDEX in message
        assert "\x1b" not in message and "\n" not in message


def test_shards_are_read_through_links(tmp_path: Path) -> None:
    """As the hub's cache keeps them."""
    saved(tmp_path / "blobs" / "0123", PLAIN)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / SINGLE).symlink_to("../blobs/0123")
    assert set(open_weights(tmp_path / "snapshot", "--base")) == set(PLAIN)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "not a mapping"), ("{", "cannot be read as JSON"), ("{}", "weight_map"), ("[" * 100_000, "cannot be read as JSON"),
        ('{"weight_map": {"a": 1}}', "weight_map"), ('{"weight_map": []}', "weight_map"), ('{"weight_map": {}}', "no tensors"),
        ('{"metadata": ' + '{"a": [' * 30 + "]}" * 30 + "}", "nested more than 40 levels deep"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' is given twice"), ("\xff", "cannot be read as JSON"),
    ],
)  # fmt: skip
def test_an_index_is_a_mapping_of_tensors_to_files(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(text.encode("latin-1"))
    assert said in refused(tmp_path)


def test_an_index_and_its_shards_agree(tmp_path: Path) -> None:
    """transformers loads whatever the shards hold: what the index does not list is no leftover to drop silently."""
    index = sharded(tmp_path, PLAIN)
    saved(
        tmp_path / "model-00001-of-00009.safetensors", {"a.weight": PLAIN["a.weight"], "more": torch.ones(1)}
    )
    assert "tensor 'more' does not lie here" in refused(tmp_path)
    saved(tmp_path / "model-00001-of-00009.safetensors", {"a.weight": PLAIN["a.weight"]})
    index["weight_map"]["lost"] = "model-00001-of-00009.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "tensor 'lost' of the index is missing" in refused(tmp_path)


@pytest.mark.parametrize("name", [SINGLE, INDEX, CONFIG])
@pytest.mark.parametrize("what", ["pipe", "endless", "loop", "huge"])
def test_nothing_endless_is_read(name: str, what: str, tmp_path: Path) -> None:
    if name == CONFIG:
        saved(tmp_path / SINGLE, PLAIN)
    place = tmp_path / name
    if what == "pipe":
        os.mkfifo(place)
    elif what == "huge":
        with place.open("wb") as file:
            file.write((1 << 30).to_bytes(8, "little"))  # of a header, where it is a safetensors file
            file.truncate(1 << 38)
    else:
        place.symlink_to("/dev/zero" if what == "endless" else name)
    assert str(tmp_path) in refused(tmp_path)


@pytest.mark.parametrize("name", ["", "a\x00b", "a\nb", "\x1b[31m", "\u202e", "n" * 501])
def test_names_of_tensors_can_be_printed(name: str, tmp_path: Path) -> None:
    message = refused(saved(tmp_path / "x.safetensors", {**PLAIN, name: torch.ones(1)}))
    assert "cannot be printed" in message
    assert "\x1b" not in message and "\n" not in message


@pytest.mark.parametrize("shape", [[2**62, 2**62, 0], [0, 2**40, 2**40], [1] * 65])
def test_shapes_that_nothing_can_hold(shape: list[int], tmp_path: Path) -> None:
    size = 4 if 0 not in shape else 0
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    assert "x.safetensors" in refused(tmp_path / "x.safetensors")


# --------------------------------------------------------------------------- results


def opened(tmp_path: Path) -> tuple[LazyWeights, dict[str, LazyWeights]]:
    for seed, name in enumerate(("base", "x")):
        saved(
            tmp_path / f"{name}.safetensors", {f"t{i}": torch.full((300,), float(seed + i)) for i in range(6)}
        )
    return open_weights(tmp_path / "base.safetensors", "b"), {
        "x": open_weights(tmp_path / "x.safetensors", "x")
    }


@pytest.mark.parametrize(("before", "after"), [(1500, 1500), (1500, None), (None, 1500), (None, None)])
def test_stopped_at_any_moment_no_parts_of_two_models_are_left(
    before: int | None, after: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash before each rename: what a reader then finds is the old model, the new one or none."""
    base, experts = opened(tmp_path)
    replace, old, new = (
        os.replace,
        load_file(tmp_path / "base.safetensors"),
        load_file(tmp_path / "x.safetensors"),
    )
    seen = set()
    for moment in range(8):
        out = tmp_path / f"out{moment}"
        merge_files(average(), base, {"x": base}, out, shard_size=before)
        left = [moment]

        def crash(source: Path, target: Path, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(source, target)

        monkeypatch.setattr(writing.os, "replace", crash)
        with contextlib.suppress(KeyboardInterrupt):
            merge_files(average(), base, experts, out, shard_size=after, force=True)
        monkeypatch.setattr(writing.os, "replace", replace)
        assert not list(out.glob(".tmp*"))
        try:
            found = open_weights(out, "out")
        except UsageError:
            seen.add("none")
            assert (out / SINGLE).exists() or not (
                out / INDEX
            ).exists()  # transformers finds the old one, or none
            continue
        values = {name: tensor.clone() for name, tensor in found.items()}
        is_old = all(torch.equal(values[n], old[n]) for n in old)
        assert is_old or all(torch.equal(values[n], new[n]) for n in new)
        seen.add("old" if is_old else "new")
    assert "new" in seen
    assert "old" in seen or before == after == 1500


@pytest.mark.parametrize("what", ["pipe", "device", "loop", "dangling", "long", "bytes"])
def test_a_result_goes_to_a_plain_place(what: str, tmp_path: Path) -> None:
    base, experts = opened(tmp_path)
    out = tmp_path / "out.safetensors"
    if what == "pipe":
        os.mkfifo(out)
    elif what in ("device", "loop", "dangling"):
        out.symlink_to({"device": "/dev/null", "loop": out.name, "dangling": "nowhere"}[what])
    else:
        out = tmp_path / {"long": "n" * 300 + ".safetensors", "bytes": "\udcff.safetensors"}[what]
    there = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UsageError, match="--out"):
        merge_files(average(), base, experts, out, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_an_input_is_not_overwritten_under_another_name(tmp_path: Path) -> None:
    base, experts = opened(tmp_path)
    (tmp_path / "link.safetensors").symlink_to("x.safetensors")
    with pytest.raises(UsageError, match="one of the inputs"):
        merge_files(average(), base, experts, tmp_path / "link.safetensors", force=True)
    folder = tmp_path / "folder"
    saved(folder / "model-of-mine-of-old.safetensors", PLAIN)  # no shard of ours: --force leaves it
    merge_files(average(), base, experts, folder, force=True)
    assert sorted(path.name for path in folder.iterdir()) == ["model-of-mine-of-old.safetensors", SINGLE]


def test_a_file_that_vanishes_meanwhile_is_named(tmp_path: Path) -> None:
    base, experts = opened(tmp_path)
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(UsageError, match=r"x.safetensors changed while it was being read"):
        merge_files(average(), base, experts, tmp_path / "out.safetensors")
