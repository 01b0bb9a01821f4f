"""bench merge: bare paths, adapters as experts, the base's configuration beside the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergesec.cli.main import main

RANK, ALPHA = 2, 6.0


def bench(*words: str) -> int:
    """The exit code of ``bench merge``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench", "merge", *words])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def weights(seed: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return {
        "layers.0.q.weight": torch.randn(4, 6, generator=drawn),
        "layers.0.up.weight": torch.randn(5, 4, generator=drawn),
        "layers.0.up.bias": torch.randn(5, generator=drawn),
    }


def folder(at: Path, tensors: dict[str, Tensor]) -> Path:
    at.mkdir()
    save_file(tensors, at / "model.safetensors")
    return at


def adapter(at: Path) -> dict[str, Tensor]:
    """Factors of one map, in the layout of peft; what they add is returned."""
    at.mkdir()
    a, b = torch.randn(RANK, 6), torch.randn(4, RANK)
    prefix = "base_model.model.layers.0.q.lora_"
    save_file({f"{prefix}A.weight": a, f"{prefix}B.weight": b}, at / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q"]}
    (at / "adapter_config.json").write_text(json.dumps(options))
    return {"layers.0.q.weight": ALPHA / RANK * (b @ a)}


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    place = folder(tmp_path / "base", weights(0))
    (place / "config.json").write_text("{}")
    (place / "tokenizer.json").write_text('{"kind": "none"}')
    (place / "modeling_mine.py").write_text("raise SystemExit")
    return place


def test_bare_paths_are_experts_called_by_their_files_or_folders(base: Path) -> None:
    save_file(weights(1), "one.safetensors")
    folder(Path("two"), weights(2))
    words = ["one.safetensors", "two", "scaling=0.5", "--base", "base", "--out", "made.safetensors"]
    assert bench("task_arithmetic", *words) == 0
    first, second, start = weights(1), weights(2), weights(0)
    made = load_file("made.safetensors")
    for name, tensor in start.items():
        torch.testing.assert_close(made[name], tensor + 0.5 * (first[name] + second[name] - 2 * tensor))


def test_an_adapter_is_an_expert_of_the_base_it_was_made_for(base: Path) -> None:
    added = adapter(Path("lora"))
    folder(Path("whole"), weights(1))
    assert bench("simple_average", "lora", "whole", "--base", "base", "--out", "made.safetensors") == 0
    made, start, other = load_file("made.safetensors"), weights(0), weights(1)
    for name, tensor in start.items():
        expected = (tensor + added.get(name, 0.0) + other[name]) / 2
        torch.testing.assert_close(made[name], expected, rtol=1e-5, atol=1e-6)


def test_an_adapter_of_another_base_names_the_map(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(Path("lora"))
    save_file({"base_model.model.other.q.lora_A.weight": torch.ones(RANK, 6),
               "base_model.model.other.q.lora_B.weight": torch.ones(9, RANK)}, "lora/adapter_model.safetensors")  # fmt: skip
    assert bench("simple_average", "lora", "base", "--base", "base", "--out", "made.safetensors") == 2
    assert "the base has no linear map for 'other.q.lora_A.weight'" in capsys.readouterr().err
    assert not Path("made.safetensors").exists()


def test_configuration_is_copied_and_code_is_not(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(Path("one"), weights(1))
    words = ["simple_average", "one", "base", "--base", "base", "--copy-config"]
    assert bench(*words, "--out", "made") == 0
    assert {p.name for p in Path("made").iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    (Path("other")).mkdir()
    Path("other/config.json").write_text('{"mine": 1}')
    assert bench(*words, "--out", "other") == 2
    assert "other/config.json exists; --force replaces it" in capsys.readouterr().err
    assert Path("other/config.json").read_text() == '{"mine": 1}'
    assert not Path("other/model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one", "two/one", "--out", "made"], "two experts are called 'one'; give NAME=PATH"),
        (["nobody", "--out", "made"], "'nobody' is not key=value, nor a file or folder"),
        (["one", "base", "--copy-config", "--out", "m.safetensors"], "--copy-config: needs a folder"),
        (["one", "scalling=1", "--out", "made"], "no such parameter"),
    ],
)
def test_what_cannot_be_read_so_is_named(
    base: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(Path("one"), weights(1))
    Path("two").mkdir()
    folder(Path("two/one"), weights(2))
    assert bench("task_arithmetic", *words, "--base", "base") == 2
    assert message in capsys.readouterr().err
