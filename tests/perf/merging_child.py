"""One measurement in a process of its own: time, the ruler's time, and peak memory, as one line of JSON.

``python merging_child.py '{"library": "own", "method": "ties", "threads": 1, ...}'``
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, bytes."""
    return 1024 * int(STATUS.read_text().split(f"{field}:")[1].split()[0])


def forget_peak() -> None:
    """Start ``VmHWM`` anew, with what was freed handed back to the system first."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def clock(run: Callable[[], Any], device: str = "cpu") -> tuple[float, Any]:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


class Ruler:
    """How long one read of all inputs and one write of the result takes at this process' copying speed.

    A copy of a model reads it once and writes it once. T experts and the base read, one result written:
    (T + 2) / 2 copies. ``fresh``: the same with the result in memory never touched before.
    """

    def __init__(self, parameters: int, experts: int, device: str) -> None:
        import numpy as np
        import torch

        self.parameters, self.experts, self.device = parameters, experts, device
        self.source = torch.ones(parameters, device=device)
        self.target = torch.ones(parameters, device=device)
        self.copies: list[float] = []
        self.fresh: list[float] = []
        self._ways: list[Callable[[], Any]] = [lambda: torch.empty(parameters, device=device)]
        if device == "cpu":
            self._ways.append(lambda: torch.from_numpy(np.empty(parameters, np.float32)))

    def measure(self, times: int = 3) -> None:
        for _ in range(times):
            self.copies.append(clock(lambda: self.target.copy_(self.source), self.device)[0])
            for way in self._ways:
                self.fresh.append(clock(lambda way=way: way().copy_(self.source), self.device)[0])  # type: ignore[misc]

    def limits(self) -> dict[str, float]:
        copy, fresh = min(self.copies), min(self.fresh)
        return {
            "limit": copy * (self.experts + 2) / 2,
            "limit_fresh": copy * self.experts / 2 + fresh,
            "copy_gb_per_second": 8 * self.parameters / copy / 1e9,
        }


def merge(task: dict[str, Any]) -> dict[str, Any]:
    """A merge in memory. Inputs are drawn anew each time where the library changes them."""
    import merging_subjects as subjects

    scale, device = subjects.Scale(task["scale"]), task.get("device", "cpu")
    shapes = scale.shapes()
    library = subjects.LIBRARIES[task["library"]]
    keeps = task["library"] != "fusionbench"
    parameters = sum(_size(shape) for shape in shapes.values())
    ruler = Ruler(parameters, task["experts"], device)
    ruler.measure()
    times, extra, held = [], [], 0
    prepared: Callable[[], Any] | None = None
    while len(times) < task["repeat"] and sum(times) < task["budget"]:
        if prepared is None or not keeps:
            prepared = None
            gc.collect()
            inputs = subjects.draw(shapes, task["experts"], device)
            prepared = library(task["method"], task.get("parameters", {}), scale, inputs)
            del inputs
        forget_peak()
        before = resident("VmRSS")
        seconds, result = clock(prepared, device)
        held, _ = before, times.append(seconds)
        extra.append(resident("VmHWM") - before)
        del result
        ruler.measure(1)
    return {
        "seconds": min(times), "runs": len(times), "parameters": parameters, "held": held,
        "extra_models": max(extra) / (4 * parameters), **ruler.limits(),
    }  # fmt: skip


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def growth(task: dict[str, Any]) -> dict[str, Any]:
    """The same merge for several numbers of experts and sizes, each the best of a few."""
    import merging_subjects as subjects

    points = []
    for parameters, experts in task["points"]:
        scale = subjects.Scale(str(parameters))
        inputs = subjects.draw(scale.shapes(), experts)
        run = subjects.own(task["method"], task.get("parameters", {}), scale, inputs)
        times = [clock(run)[0] for _ in range(task["repeat"])]
        points.append({"parameters": parameters, "experts": experts, "seconds": min(times)})
        del inputs, run
    return {"points": points}


def matching(task: dict[str, Any]) -> dict[str, Any]:
    import merging_subjects as subjects

    run = subjects.matching(task["method"], task["width"])
    return {"seconds": min(clock(run)[0] for _ in range(task["repeat"]))}


def stream(task: dict[str, Any]) -> dict[str, Any]:
    """Files on disk merged through ``checkpoints``: seconds and peak memory beyond the imports."""
    from mergesec.planning.catalog import load_catalog
    from mergesec.streaming.merging import merge_files
    from mergesec.streaming.reading import open_weights

    entry = load_catalog().get("merging", task["method"])
    folder = Path(task["folder"])
    with tempfile.TemporaryDirectory(dir=folder) as out:

        def run(part: str) -> int:
            base = open_weights(folder / f"{part}-base.safetensors", "base")
            experts = {
                str(i): open_weights(folder / f"{part}-{i}.safetensors", str(i))
                for i in range(task["experts"])
            }
            method = entry.create(entry.card.bind(task["method"], task.get("parameters", {})))
            merge_files(method, base, experts, Path(out, "out.safetensors"), force=True)
            return max(place.size for place in base.extents.values())

        run("small")
        forget_peak()
        before = resident("VmRSS")
        seconds, largest = clock(lambda: run("large"))
        size = (folder / "large-base.safetensors").stat().st_size
        extra = resident("VmHWM") - before
    return {
        "seconds": seconds, "bytes": size, "largest": largest, "extra": extra,
        "tensors_per_expert": extra / largest / task["experts"],
    }  # fmt: skip


def generate(task: dict[str, Any]) -> dict[str, Any]:
    """Checkpoints shaped like a 7-billion-parameter language model with fewer layers, bfloat16."""
    import torch
    from safetensors.torch import save_file

    folder, generator = Path(task["folder"]), torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(1 << 22, generator=generator)

    def filled(shape: tuple[int, ...], shift: int, weight: float) -> torch.Tensor:
        size = _size(shape)
        start = noise.roll(shift * 7919)
        moved = start + weight * noise.roll(shift * 104729 + 1)
        return moved.repeat(-(-size // len(moved)))[:size].view(shape).bfloat16()

    for part, layers, width in (("small", 1, 64), ("large", task["layers"], task["width"])):
        inner, words = width * 43 // 16, 32000 * width // 4096
        block = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width),
                 "gate": (inner, width), "up": (inner, width), "down": (width, inner), "norm": (width,)}  # fmt: skip
        shapes = {f"layers.{i}.{n}": shape for i in range(layers) for n, shape in block.items()}
        shapes = {"embed": (words, width), **shapes, "head": (words, width)}
        for number, name in enumerate(["base", *map(str, range(task["experts"]))]):
            tensors = {
                n: filled(shape, place, 0.05 * number) for place, (n, shape) in enumerate(shapes.items())
            }
            save_file(tensors, folder / f"{part}-{name}.safetensors")
            del tensors
    return {}


def main() -> None:
    task = json.loads(sys.argv[1])
    os.environ["OMP_NUM_THREADS"] = str(task.get("threads", 1))
    sys.path[1:1] = task.get("path", [])
    import torch

    torch.set_num_threads(task.get("threads", 1))
    result = globals()[task["kind"]](task)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
