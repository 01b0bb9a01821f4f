"""Mutated model folders: each is read, or refused by a UsageError that names file and field, without hang or hunger.

Seeded and bounded: ``MERGESEC_CAMPAIGN`` folders in all (120 by default, thousands on demand). A folder goes the way
of a base (built, read, its words or head made) or of an expert, and is looked at as ``bench plan`` does before.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from extras import needs
from safetensors.torch import load_file, save_file

from mergesec.contracts import ContractError
from mergesec.errors import UsageError
from mergesec_tasks._modelfolders import inspect
from mergesec_tasks.text.hf_causal import HfCausal
from mergesec_tasks.text.hf_text import HfText
from mergesec_tasks.vision.clip import Clip
from mergesec_tasks.vision.hf_vit import HfVit
from mergesec_tasks.vision.open_clip import OpenClip
from mergesec_tasks.vision.timm_vit import TimmVit

transformers = needs("transformers")
tokenizers = needs("tokenizers")
peft = needs("peft")

BUDGET = int(os.environ.get("MERGESEC_CAMPAIGN", "120"))
SECONDS, GROWTH = 20.0, 400 << 20
"""What one folder may take of time and of memory, in bytes: none of them holds more than a megabyte."""
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 33, 10**9, 10**30, 0.5, 1e308, -1e-9, "", "relu", "x" * 300, "\x00", "\ud800",
    "../../etc/passwd", [], {}, [[[]]], {"a": 1}, [None], [1, 2], {"rope_type": "yarn"},
)  # fmt: skip
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "i", "am", "sad", "happy", "dog", "label", ":"]


class Kind(NamedTuple):
    """A backbone, its good folder, and what is asked of one."""

    name: str
    folder: Path
    parameter: str
    make: Callable[[str], Any]
    use: Callable[[Any], Any]


# --------------------------------------------------------------------------- good folders


def _words(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)


def _clip_words(folder: Path) -> None:
    from mergesec_tasks.mini_clip._words import save_words, vocabulary

    save_words(vocabulary([]), folder)


def _pixels(folder: Path) -> None:
    told = {
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"height": 32, "width": 32},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(told))


def _networks() -> dict[str, Any]:
    shared = {"vocab_size": len(WORDS), "max_position_embeddings": 24, "pad_token_id": 0}
    patches = {"image_size": 32, "patch_size": 8}
    llama = {**SIZES, **shared, "num_key_value_heads": 2}
    vision = {**SIZES, **patches}
    text = {**SIZES, "vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513}
    return {
        "bert": transformers.BertModel(transformers.BertConfig(**SIZES, **shared)),
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=24, vocab_size=len(WORDS))
        ),
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama)),
        "mistral": transformers.MistralForCausalLM(transformers.MistralConfig(**llama)),
        "vit": transformers.ViTModel(transformers.ViTConfig(**SIZES, **patches)),
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, **patches
        )),
        "clip": transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        ),
    }  # fmt: skip


def _features(images: bool) -> Callable[[Any], Any]:
    def use(subject: Any) -> Any:
        network = subject.build()
        network.load_state_dict(dict(subject.base_weights()))
        subject.anatomy()
        with torch.no_grad():
            inputs = torch.rand(1, 3, 20, 20) if images else ["i am happy", "dog"]
            subject.features(network.eval(), inputs)
            if isinstance(subject, HfCausal):
                subject.label_rows(network, ["sad", "happy"])
            if isinstance(subject, (Clip, OpenClip)):
                subject.zero_shot([["a cat"], ["a dog"]], torch.device("cpu"))

    return use


def _kinds(home: Path) -> list[Kind]:
    kinds: list[Kind] = []
    for name, network in _networks().items():
        folder = home / name
        network.save_pretrained(folder, max_shard_size="40KB" if name in ("bert", "vit") else "5GB")
        images = name in ("vit", "dinov2", "clip")
        (_clip_words if name == "clip" else _pixels if images else _words)(folder)
        if name == "bert":
            kinds.append(
                Kind("hf-text", folder, "path", lambda p: HfText(p, 0, 12, "mean"), _features(False))
            )
        elif name == "clip":
            kinds.append(Kind("clip", folder, "model", lambda p: Clip(p, 0, 0, "zero-shot"), _features(True)))
        elif images:
            kinds.append(Kind("hf-vit", folder, "path", lambda p: HfVit(p, 48, 0), _features(True)))
        else:
            make = lambda p: HfCausal(p, 0, 12, "{text} label :", "")  # noqa: E731
            kinds.append(Kind("hf-causal", folder, "path", make, _features(False)))
    return [*kinds, *_others(home)]


def _others(home: Path) -> list[Kind]:
    """Layouts of open_clip and timm, where they are installed."""
    kinds: list[Kind] = []
    try:
        import open_clip
        import timm
    except ImportError:
        return kinds
    model = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    folder = home / "open_clip"
    folder.mkdir()
    state = open_clip.CLIP(**model).state_dict()
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "open_clip_model.safetensors")
    pixels = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": pixels}))
    kinds.append(
        Kind("open-clip", folder, "model", lambda p: OpenClip(p, "", 0, 0, "zero-shot"), _features(True))
    )
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    folder = home / "timm"
    folder.mkdir()
    network = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=5, **arguments)
    save_file(network.state_dict(), folder / "model.safetensors")
    told = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": arguments,
        "pretrained_cfg": {**pixels, "input_size": [3, 32, 32]},
    }
    (folder / "config.json").write_text(json.dumps(told))
    kinds.append(Kind("timm-vit", folder, "model", lambda p: TimmVit(p, 0, 0), _features(True)))
    return kinds


def _adapter(base: Path, folder: Path) -> None:
    plain = transformers.BertModel.from_pretrained(base)
    settings = peft.LoraConfig(r=2, target_modules=["query", "value"], alpha_pattern={"query": 3})
    peft.get_peft_model(plain, settings).save_pretrained(folder)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[Kind]:
    torch.manual_seed(0)
    home = tmp_path_factory.mktemp("models")
    found = _kinds(home)
    _adapter(home / "bert", home / "adapter")
    return found


# --------------------------------------------------------------------------- what happens to them


def _bytes(rng: random.Random, path: Path) -> None:
    """A few bytes flipped, dropped, doubled or put in, mostly near the beginning; or the end cut off."""
    data = bytearray(path.read_bytes())
    if rng.random() < 0.15:
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
        return
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(min(len(data), rng.choice((9, 400, 10**9)))) if data else 0
        how = rng.randrange(4)
        if how == 0 and data:
            data[place] = rng.randrange(256)
        elif how == 1 and data:
            del data[place : place + rng.randint(1, 40)]
        elif how == 2:
            data[place:place] = data[place : place + rng.randint(1, 200)]
        else:
            data[place:place] = bytes(rng.choice(b'{}[]:,"\n\t -0aZ9\xff') for _ in range(3))
    path.write_bytes(bytes(data))


def _spots(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a nested value, of long lists and tables the first few."""
    found: list[tuple[Any, Any]] = []
    items = list(value.items() if isinstance(value, dict) else enumerate(value))[:60]
    for key, inner in items:
        found.append((value, key))
        if isinstance(inner, (dict, list)):
            found += _spots(inner)
    return found


def _values(rng: random.Random, path: Path) -> None:
    """A few values of a JSON file replaced by odd ones, dropped, put under another name, or new."""
    value = json.loads(path.read_text())
    if rng.random() < 0.05:
        value = copy.deepcopy(rng.choice(ODD))
    for _ in range(rng.randint(1, 3)):
        spots = _spots(value) if isinstance(value, (dict, list)) else []
        if not spots:
            break
        container, key = rng.choice(spots)
        how = rng.randrange(5)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[rng.choice([f"{key}x", "num_labels", "quantization_config", ""])] = container.pop(key)
        elif how == 2 and type(container[key]) in (int, float):
            container[key] = rng.choice(
                [container[key] * 2, container[key] + 1, container[key] * 10**6, -container[key]]
            )
        else:
            container[key] = copy.deepcopy(rng.choice(ODD))
    path.write_text(json.dumps(value))


def _tensors(rng: random.Random, path: Path) -> None:
    """Tensors dropped, renamed, of another shape or type, not finite, or too many."""
    tensors = load_file(path)
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(sorted(tensors))
        tensor, how = tensors[name], rng.randrange(7)
        if how == 0 and len(tensors) > 1:
            del tensors[name]
        elif how == 1:
            tensors[rng.choice([f"{name}x", f"model.{name}", "a", "\x1b[31m", "layers.999999999.x"])] = (
                tensors.pop(name)
            )
        elif how == 2:
            tensors[name] = tensor.reshape(-1)
        elif how == 3 and tensor.ndim:
            tensors[name] = tensor[: max(1, len(tensor) // 2)].clone()
        elif how == 4:
            tensors[name] = tensor.to(
                rng.choice([torch.int8, torch.float16, torch.float64, torch.bool, torch.float8_e4m3fn])
            )
        elif how == 5:
            tensors[name] = torch.zeros(rng.choice([(0,), (1,), (3, 0), (2, 2, 2)]))
        else:
            tensors[name.replace(".1.", ".2.") + ("" if ".1." in name else ".more")] = tensor.clone()
    save_file(tensors, path, {"format": "pt"})


def _place(rng: random.Random, path: Path) -> None:
    """Something else where a file was: nothing, a folder, a pipe, a device, a link to nowhere or in a circle."""
    path.unlink()
    how = rng.randrange(6)
    if how == 0:
        path.mkdir()
    elif how == 1:
        os.mkfifo(path)
    elif how in (2, 3, 4):
        path.symlink_to(("/dev/zero", "/nowhere", path.name)[how - 2])


def _mutated(rng: random.Random, folder: Path) -> str:
    """One or two things done to a folder's files; which."""
    told = []
    for _ in range(rng.choice((1, 1, 2))):
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.is_symlink())
        if not files:
            break
        path = rng.choice(files)
        ways = [_bytes, _place, _values, _values, _values] if path.suffix == ".json" else [_bytes, _place]
        ways += [_tensors, _tensors] if path.suffix == ".safetensors" else []
        way = rng.choice(ways)
        try:
            way(rng, path)
        except ValueError:  # what an earlier change left is no JSON or no tensors any more
            continue
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            continue
        told.append(f"{way.__name__[1:]} of {path.name}")
    index = folder / "model.safetensors.index.json"
    if rng.random() < 0.05 and not index.exists() and not index.is_symlink():
        index.write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
        told.append("another index")
    return ", ".join(told)


# --------------------------------------------------------------------------- how they are met


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _met(what: str, read: Callable[[], Any]) -> tuple[str, str]:
    """How a folder was met, in a word, and what is wrong with that; empty if nothing."""
    started, before = time.perf_counter(), _resident()
    met = "read"
    try:
        read()
    except (UsageError, ContractError) as error:
        met, text = "refused", str(error)
        if len(text) > 3000 or "Traceback" in text or not text.isprintable():
            return met, f"{what}: a message of {len(text)} characters: {text[:200]!r}"
    except Exception as error:
        return "raw", f"{what}: {type(error).__name__}: {str(error)[:300]}"
    spent, grown = time.perf_counter() - started, _resident() - before
    if spent > SECONDS or grown > GROWTH:
        return met, f"{what}: {spent:.0f} s, {grown >> 20} MB"
    return met, ""


def _report(found: list[tuple[str, str]]) -> None:
    counts = {word: sum(1 for met, _ in found if met == word) for word in ("read", "refused", "raw")}
    print(f"{len(found)} folders: {counts}")
    wrong = [text for _, text in found if text]
    assert not wrong, f"{len(wrong)} of {len(found)}\n" + "\n".join(wrong[:25])
    assert counts["refused"] > len(found) // 3  # the mutations reach what is read


def _planned(kind: Kind, base: Path, expert: Path | None = None) -> None:
    if kind.name not in ("open-clip", "timm-vit"):
        experts = {"suite.experts.mnist": str(expert)} if expert else {}
        inspect(kind.name, {kind.parameter: str(base)}, "suite.backbone", experts)


@pytest.mark.filterwarnings("ignore")
def test_the_folders_are_good_before(kinds: list[Kind]) -> None:
    for kind in kinds:
        _planned(kind, kind.folder, kind.folder)
        subject = kind.make(str(kind.folder))
        kind.use(subject)
        assert subject.published(str(kind.folder)).keys() == subject.base_weights().keys()
    assert kinds[0].make(str(kinds[0].folder)).published(str(kinds[0].folder.parent / "adapter"))


@pytest.mark.filterwarnings("ignore")
def test_mutated_bases_are_read_or_refused(kinds: list[Kind], tmp_path: Path) -> None:
    rng, found = random.Random(31), []
    for number in range((BUDGET + 1) // 2):
        kind = kinds[number % len(kinds)]
        folder = tmp_path / "m"
        shutil.copytree(kind.folder, folder)
        told = f"{kind.folder.name} {number}: {_mutated(rng, folder)}"
        planned = _met(f"plan of {told}", lambda kind=kind, folder=folder: _planned(kind, folder))
        used = _met(told, lambda kind=kind, folder=folder: kind.use(kind.make(str(folder))))
        found.append((used[0], planned[1] or used[1]))
        if planned[0] == "refused" and used[0] == "read":
            found[-1] = used[0], f"{told}: refused by the plan, and read"
        shutil.rmtree(folder)
    _report(found)


@pytest.mark.filterwarnings("ignore")
def test_mutated_experts_are_read_or_refused(kinds: list[Kind], tmp_path: Path) -> None:
    rng, found = random.Random(32), []
    subjects = [kind.make(str(kind.folder)) for kind in kinds]
    adapters = kinds[0].folder.parent / "adapter"
    for number in range(BUDGET // 2):
        place = number % (len(kinds) + 2)
        kind, subject = (kinds[place], subjects[place]) if place < len(kinds) else (kinds[0], subjects[0])
        folder = tmp_path / "m"
        shutil.copytree(kind.folder if place < len(kinds) else adapters, folder)
        told = f"expert {folder.name} of {kind.folder.name} {number}: {_mutated(rng, folder)}"
        planned = _met(
            f"plan of {told}", lambda kind=kind, folder=folder: _planned(kind, kind.folder, folder)
        )
        used = _met(told, lambda subject=subject, folder=folder: subject.published(str(folder)))
        found.append((used[0], planned[1] or used[1]))
        if planned[0] == "refused" and used[0] == "read":
            found[-1] = used[0], f"{told}: refused by the plan, and read"
        shutil.rmtree(folder)
    _report(found)


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "num_labels"]
)
def test_a_number_beyond_the_files_costs_neither_time_nor_memory(
    kinds: list[Kind], field: str, tmp_path: Path
) -> None:
    shutil.copytree(kinds[0].folder, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: 10**9}))
    met, wrong = _met(field, lambda: HfText(str(tmp_path / "m"), 0, 12, "mean").build())
    assert (met, wrong) == ("read" if field == "num_labels" else "refused", "")  # labels are those of a head
