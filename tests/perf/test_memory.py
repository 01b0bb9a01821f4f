"""What work needs in memory: ``bench merge`` a few tensors, however large the files are; a training the optimizer's own
copies of the weights, its checkpoints none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

PROBE = """
import json, sys
from pathlib import Path
from mergesec.planning.catalog import load_catalog
from mergesec.streaming.merging import merge_files
from mergesec.streaming.reading import open_weights

def peak():
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split("VmHWM:")[1].split()[0])

def merge(folder, method):
    entry = load_catalog().get("merging", method)
    made = entry.create(entry.card.bind(method, {}))
    experts = {n: open_weights(folder / f"{n}.safetensors", n) for n in ("a", "b")}
    merge_files(made, open_weights(folder / "base.safetensors", "base"), experts, folder / "out.safetensors", force=True)

small, large = Path(sys.argv[1]), Path(sys.argv[2])
for method in sys.argv[3:]:
    merge(small, method)
imported = peak()
for method in sys.argv[3:]:
    merge(large, method)
print(json.dumps(peak() - imported))
"""


def generate(folder: Path, width: int, layers: int, dtype: torch.dtype) -> int:
    """A base and two experts with ``layers`` square matrices; bytes of the largest tensor."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(width + 7, width, generator=generator)
    for position, name in enumerate(("base", "a", "b")):
        tensors = {"norm": torch.ones(width, dtype=dtype), "steps": torch.arange(3)}
        for layer in range(layers):
            tensors[f"layer{layer}"] = (
                noise[layer % 7 :][:width] * (layer + 1) + position * 0.01 * noise[:width]
            ).to(dtype)
        save_file(tensors, folder / f"{name}.safetensors")
    return width * width * dtype.itemsize


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 2560), (torch.bfloat16, 3584)])
def test_memory_stays_below_three_tensors_per_expert(dtype: torch.dtype, width: int, tmp_path: Path) -> None:
    """Three files of 210 MB: what a process needs beyond its imports, for averaging, TIES and DARE."""
    generate(tmp_path / "small", 8, 1, dtype)
    largest = generate(tmp_path / "large", width, 8, dtype)
    assert (tmp_path / "large" / "base.safetensors").stat().st_size > 200e6
    methods = ["task_arithmetic", "ties", "dare"]
    arguments = [str(tmp_path / "small"), str(tmp_path / "large"), *methods]
    ran = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=True
    )
    assert json.loads(ran.stdout) < 3 * 2 * largest


TRAINING = """
import gc, json, sys
from pathlib import Path
import torch
from torch import nn
from mergesec.contracts import Backbone, Recipe, Split
from mergesec.execution.store import Store
from mergesec.execution.work import Bench, Keeper, packed, unpacked
from mergesec.training import fit

WIDTH, MAPS = 1200, 24

def status(field):
    return 1024 * int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

class Wide(Backbone):
    name = "wide"
    def build(self):
        return nn.ModuleList([nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(MAPS)])
    def base_weights(self):
        return self.build().state_dict()
    def anatomy(self):
        raise AssertionError
    def features(self, network, inputs):
        return sum(layer(inputs) for layer in network)

class Few:
    def batch(self, split, index, device):
        return split.take(index)
    def noised(self, batch, generator):
        return batch
    def outputs(self, model, head, inputs):
        return model.features(inputs)
    def loss(self, outputs, targets):
        return outputs.square().mean()

def train(rows):
    bench = Bench(Store(Path(sys.argv[1])), None, torch.device("cpu"), checkpoint_seconds=0.0)
    backbone, split = Wide(), Split(torch.ones(rows, WIDTH), torch.zeros(rows, dtype=torch.long))
    base = backbone.base_weights()
    recipe = Recipe(optimizer="adamw", learning_rate=0.1, epochs=1, batch_size=1)
    weights = fit(backbone, Few(), base, {}, split, recipe, 0, bench.device, watch=Keeper(bench, "k", 0))
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    bench.store.put("expert", "k", packed(weights), {})
    return sum(held.values())

gc.disable()  # what nobody needs any more goes without being looked for
before = status("VmHWM")
left = train(3)
size = 4 * MAPS * WIDTH**2
print(json.dumps([(status("VmHWM") - before) / size, left / size]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_a_training_holds_base_weights_gradients_and_moments_and_no_copy_for_checkpoints(
    tmp_path: Path,
) -> None:
    """In units of the weights, 138 MB: five while it trains, checkpoints after every step; two when it is done."""
    ran = subprocess.run(
        [sys.executable, "-c", TRAINING, str(tmp_path)], capture_output=True, text=True, check=True
    )
    peak, left = json.loads(ran.stdout)
    assert 4.0 < peak < 6.5
    assert 2.0 <= left < 2.2
