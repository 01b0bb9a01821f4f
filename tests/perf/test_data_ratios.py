"""Data on the way to the network, against what cannot be avoided, in the same run: ratios, never seconds."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import needs
from PIL import Image
from safetensors.torch import save

from mergesec.compat import ensure_torchvision
from mergesec.contracts import Model, Recipe, Split, load_network
from mergesec.execution.store import Store
from mergesec.execution.work import Bench
from mergesec.inference import EVALUATION_BATCH, predict
from mergesec.planning.catalog import load_catalog
from mergesec.training import fit
from mergesec_tasks.mini_clip._words import tokenizer, vocabulary
from mergesec_tasks.vision.clip import Clip
from mergesec_tasks.vision.folder import FolderTask, decode
from mergesec_tasks.vision.hf_vit import HfVit

transformers = needs("transformers")
CPU = torch.device("cpu")
ROWS, SIDE = 10_000, 64


def ratio(ours: Callable[[], Any], peer: Callable[[], Any], times: int = 3) -> float:
    """Best time over best time, taken in turns so that both see the same machine; on one thread and in
    seconds of the processor, which a busy neighbour does not stretch."""
    best = [float("inf"), float("inf")]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(times):
        for index, run in enumerate((ours, peer)):
            start = time.process_time()
            run()
            best[index] = min(best[index], time.process_time() - start)
    torch.set_num_threads(threads)
    return best[0] / best[1]


def photographs(count: int, side: int, kind: str) -> list[bytes]:
    """Encoded smooth random images: as hard to decode as photographs."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    pixels = (fine * 255).byte().permute(0, 2, 3, 1).numpy()
    found = []
    for picture in pixels:
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, kind)
        found.append(stream.getvalue())
    return found


def test_reading_a_cached_set_against_decoding_it(benchmark: Any, tmp_path: Path) -> None:
    """Peer: decoding the same images (measured on a tenth of them, JPEG) at the size they are stored at."""
    encoded = photographs(ROWS // 10, SIDE, "JPEG")
    pixels = decode(encoded, range(ROWS // 10), SIDE, str).repeat(10, 1, 1, 1)
    store = Store(tmp_path)
    store.put("data", "k", save({"train/inputs": pixels, "train/targets": torch.arange(ROWS)}), {})
    del pixels
    catalog = load_catalog()

    def read() -> int:
        """A worker that has not read the set before touches every byte of it, batch by batch."""
        tensors, _ = Bench(store, catalog, CPU).read("data", "k")
        split = Split(tensors["train/inputs"], tensors["train/targets"])
        return sum(len(split.take(index)) for index in torch.arange(ROWS).split(EVALUATION_BATCH))

    start = time.perf_counter()
    assert read() == ROWS
    first = time.perf_counter() - start  # verifies every byte, once
    benchmark(read)
    found = ratio(read, lambda: decode(encoded, range(ROWS // 10), SIDE, str), times=5) / 10
    benchmark.extra_info["ratio_to_decoding"] = found
    benchmark.extra_info["first_read_seconds"] = first
    assert found < 1 / 20, found


def vit(folder: Path, width: int = 256, layers: int = 4) -> HfVit:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, image_size=56, patch_size=14,
        intermediate_size=4 * width,
    )  # fmt: skip
    transformers.ViTModel(config).save_pretrained(folder)
    return HfVit(str(folder), 0, 0)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> tuple[HfVit, FolderTask, Split, dict[str, Any]]:
    """A small ViT at 56 pixels, 256 images of 64 pixels mapped from a store, and a head."""
    ensure_torchvision()
    folder = tmp_path_factory.mktemp("data-ratios")
    backbone = vit(folder / "vit")
    task = FolderTask(SIDE, 0, 0, "image", "label")
    task.name = "own"
    pixels = torch.randint(0, 256, (256, 3, SIDE, SIDE), dtype=torch.uint8)
    store = Store(folder / "store")
    store.put("data", "k", save({"train/inputs": pixels, "train/targets": torch.arange(256) % 10}), {})
    tensors, _ = Bench(store, load_catalog(), CPU).read("data", "k")
    head = {"weight": torch.randn(10, 256), "scale": torch.tensor(16.0)}
    return backbone, task, Split(tensors["train/inputs"], tensors["train/targets"]), head


def test_evaluation_against_bare_forward_passes(benchmark: Any, subject: Any) -> None:
    """Peer: the forward passes of the same evaluation. Both are timed in one pass, in which a machine that
    slows down for a while slows both; of the passes the median."""
    backbone, task, split, head = subject
    network = load_network(backbone, backbone.base_weights())
    inside: list[float] = []
    began: list[float] = []
    network.register_forward_pre_hook(lambda *_: began.append(time.process_time()))
    network.register_forward_hook(lambda *_: inside.append(time.process_time() - began.pop()))

    def evaluate() -> float:
        inside.clear()
        start = time.process_time()
        predict(task, Model(backbone, network), head, split, CPU)
        return (time.process_time() - start) / sum(inside)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    evaluate()
    benchmark.pedantic(evaluate, rounds=1)
    found = statistics.median(evaluate() for _ in range(9))
    torch.set_num_threads(threads)
    benchmark.extra_info["ratio_to_forward"] = found
    assert len(inside) == -(-len(split) // EVALUATION_BATCH)
    assert found < 1.15, found


def test_the_second_epoch_spends_its_time_on_training(
    benchmark: Any, subject: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peer: the epoch itself. Time in ``Task.batch``: gathering rows, moving them, bytes to floats."""
    backbone, task, split, head = subject
    spent, ends = [0.0], [time.perf_counter()]
    batch = FolderTask.batch

    def timed(self: FolderTask, *arguments: Any) -> Split:
        start = time.perf_counter()
        found = batch(self, *arguments)
        spent[-1] += time.perf_counter() - start
        return found

    class Clock:
        def resume(self) -> None:
            return None

        def due(self) -> bool:
            return False

        def keep(self, *_: Any) -> None:
            raise AssertionError

        def step(self, done: int, steps: int, loss: float) -> None:
            if done == steps // 2:
                spent.append(0.0)
                ends.append(time.perf_counter())

    monkeypatch.setattr(FolderTask, "batch", timed)
    recipe = Recipe(epochs=2, batch_size=32)
    base = backbone.base_weights()
    few = split.take(torch.arange(128))
    benchmark.pedantic(lambda: fit(backbone, task, base, head, few, recipe, 0, CPU, watch=Clock()), rounds=1)  # type: ignore[arg-type]
    share = spent[-1] / (time.perf_counter() - ends[-1])
    benchmark.extra_info["data_share_of_second_epoch"] = share
    assert share < 0.05, share


# --------------------------------------------------------------------------- FusionBench


class Pictures(torch.utils.data.Dataset[Any]):
    """Encoded images, decoded at every access, as the data sets that FusionBench reads are."""

    def __init__(self, encoded: list[bytes], classes: int) -> None:
        self.encoded, self.classes = encoded, classes

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Any:
        return Image.open(io.BytesIO(self.encoded[index])).convert("RGB"), index % self.classes


def tiny_clip(folder: Path) -> Any:
    """A CLIP of three blocks with a byte tokenizer and a processor."""
    torch.manual_seed(3)
    vision = {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
        "intermediate_size": 128,
    }  # fmt: skip
    text = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        "vocab_size": 514, "max_position_embeddings": 77, "bos_token_id": 512, "eos_token_id": 513,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    words = tokenizer(vocabulary([]))
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        words,
    )
    processor.save_pretrained(folder)
    words.save_pretrained(folder)
    return model, processor


@pytest.mark.fusionbench
def test_evaluation_against_fusionbench(benchmark: Any, tmp_path: Path) -> None:
    """Peer: CLIPVisionModelTaskPool.evaluate on the same tiny CLIP and images, batches of the same size.

    Both make the zero-shot head and evaluate once; ours reads images that were decoded once, theirs decodes
    at every evaluation. The accuracies must agree.
    """
    needs("fusion_bench")
    ensure_torchvision()
    from transformers.models.clip import modeling_clip

    if not hasattr(modeling_clip, "CLIPVisionTransformer"):  # gone since transformers 5.8
        modeling_clip.CLIPVisionTransformer = transformers.CLIPVisionModel
    pools = needs("fusion_bench.taskpool.clip_vision.taskpool")

    model, processor = tiny_clip(tmp_path / "clip")
    encoded = photographs(1000, 32, "PNG")
    pool = pools.CLIPVisionModelTaskPool(
        {"mnist": Pictures(encoded, 10)}, processor=processor, clip_model=model,
        dataloader_kwargs={"batch_size": EVALUATION_BATCH, "num_workers": 0},
    )  # fmt: skip
    subject = Clip(str(tmp_path / "clip"), 0, 0, "zero-shot")
    network = load_network(subject, subject.base_weights())
    task = FolderTask(32, 0, 0, "image", "label")
    task.name, task.classes = "mnist", [str(i) for i in range(10)]
    templates = load_catalog().get("task", "mnist").card.templates
    split = Split(decode(encoded, range(1000), 32, str), torch.arange(1000) % 10)
    accuracies: dict[str, float] = {}

    def ours() -> None:
        head = subject.zero_shot(task.prompts(templates), CPU)
        assert head is not None
        found = predict(task, Model(subject, network), head, split, CPU)
        accuracies["ours"] = float((found == split.targets).double().mean())

    tower = transformers.CLIPVisionModel.from_pretrained(tmp_path / "clip").eval()

    def theirs() -> None:
        accuracies["theirs"] = float(pool.evaluate(tower)["mnist"]["accuracy"])

    ours()
    theirs()
    benchmark.pedantic(ours, rounds=1)
    found = ratio(ours, theirs)
    benchmark.extra_info["ratio_to_fusionbench"] = found
    assert accuracies["ours"] == pytest.approx(accuracies["theirs"], abs=0.005)
    assert found < 1, found
