"""What surrounds the work - command line, store, records, boards - against peers in the same run: ratios only."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from board_subjects import backdoor_texts
from safetensors.torch import save

from mergesec.evidence.records import Count, Record, _Pool, count
from mergesec.evidence.statistics import DRAWS, Bootstrap
from mergesec.execution.steps import merge, run
from mergesec.execution.store import Store, parts_of
from mergesec.execution.work import Bench, Work, packed
from mergesec.files import write_atomic
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import load_grid
from mergesec.planning.plan import Step, step_key
from mergesec.planning.refs import make_ref

OLD = time.time() - 100
"""A time at which a file was not changed just now."""


def ratio(ours: Callable[[], Any], peer: Callable[[], Any], times: int = 5) -> float:
    """Best processor time over best, in turns, so that both see the same machine."""
    best = [float("inf"), float("inf")]
    for _ in range(times):
        for index, way in enumerate((ours, peer)):
            start = time.process_time()
            way()
            best[index] = min(best[index], time.process_time() - start)
    return best[0] / best[1]


@pytest.mark.parametrize(
    ("words", "absent"),
    [
        (["--help"], {"rich", "pydantic", "numpy", "yaml", "tempfile"}),
        (["list"], {"rich", "pydantic", "numpy", "yaml", "typer"}),
    ],
)
def test_words_that_start_no_work_load_no_more_than_they_need(words: list[str], absent: set[str]) -> None:
    """Modules rather than seconds: what these take to load was half of the time."""
    program = f"""
import sys
from mergesec.cli.main import main
sys.argv = ["bench", *{words!r}]
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    loaded = set(ran.stderr.split())
    assert "mergesec.cli.main" in loaded
    assert not absent & loaded, absent & loaded


def _outcomes(number: int, samples: int) -> list[dict[int, Count]]:
    rng = np.random.default_rng(0)
    return [{seed: count(rng.random(samples) < 0.6) for seed in range(5)} for _ in range(number)]


def _plainly(task: str, row: dict[int, Count]) -> Any:
    """The draws of a rate: how often samples are drawn, as floats, times outcomes and mask, one rate at a time."""
    sums = [_drawn(task, c.total) @ np.stack(c.arrays(), 1).astype(np.float32) for c in row.values()]
    return np.stack([np.divide(s[:, 0], s[:, 1], dtype=np.float64) for s in sums]).mean(0)


@cache
def _drawn(task: str, samples: int) -> Any:
    seed = hashlib.sha256(f"samples|{task}|{samples}".encode()).digest()[:8]
    rng = np.random.default_rng(int.from_bytes(seed, "big"))
    places = rng.integers(0, samples, (DRAWS, samples)) + samples * np.arange(DRAWS)[:, None]
    often = np.bincount(places.ravel(), minlength=DRAWS * samples)
    return often.reshape(DRAWS, samples).astype(np.float32)


def test_draws_of_many_outcomes_against_one_rate_after_another() -> None:
    """Peer: a product of matrices for each outcome: the same numbers but for the rounding of a sum. Counting them
    together is what large boards live by."""
    rows = _outcomes(30, 800)
    bootstrap = Bootstrap()
    bootstrap.rate("t", _outcomes(1, 800)[0])

    def ours() -> list[Any]:
        bootstrap._rates.clear()
        bootstrap.tell(("t", row) for row in rows)
        return [bootstrap.rate("t", row).samples for row in rows]

    def peer() -> list[Any]:
        return [_plainly("t", row) for row in rows]

    for a, b in zip(ours(), peer(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-14, atol=0)
    found = ratio(ours, peer, times=3)
    assert found < 0.2, found


def test_records_hold_what_they_tell_alike_once() -> None:
    """Peer: the records one by one. Memory, of a backdoor grid whose cells share base, experts and merges."""
    texts = list(backdoor_texts(150))
    sizes = []
    for pool in (_Pool(), None):
        tracemalloc.start()
        read = (Record.model_validate_json(text) for text in texts)
        kept = [pool.shared(record) if pool else record for record in read]
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(kept) == len(texts)
    assert sizes[0] < 0.5 * sizes[1], sizes


def _stored(store: Store, number: int) -> None:
    """So many committed artifacts, of one tensor each."""
    folder = store.root / "artifacts" / "merge"
    store.put("merge", "0" * 40, save({"w": torch.zeros(1)}), {})
    meta, blob = ((folder / f"{'0' * 40}{end}").read_bytes() for end in (".json", ".safetensors"))
    for i in range(1, number):
        (folder / f"{i:040x}.json").write_bytes(meta)
        (folder / f"{i:040x}.safetensors").write_bytes(blob)


def test_many_artifacts_do_not_slow_the_begin_of_a_run(tmp_path: Path) -> None:
    """Peer: one look at each file. What is committed, and what was left behind, are told from names."""
    store = Store(tmp_path)
    _stored(store, 3000)
    files = sorted((tmp_path / "artifacts" / "merge").iterdir())
    found = ratio(lambda: (store.sweep(), store.keys()), lambda: [path.lstat() for path in files])
    assert len(store.keys()) == 3000
    assert found < 1, found


def test_an_artifact_is_hashed_once_and_again_when_it_changed(tmp_path: Path) -> None:
    """Peer: SHA-256 of its bytes."""
    store, blob = Store(tmp_path), save({"w": torch.randn(4_000_000)})
    store.put("merge", "k", blob, {})
    path = tmp_path / "artifacts" / "merge" / "k.safetensors"
    os.utime(path, (OLD, OLD))
    assert store.read("merge", "k")[0] == blob
    found = ratio(lambda: store.read("merge", "k"), lambda: hashlib.sha256(blob).digest())
    assert found < 0.9, found
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([blob[-1] ^ 1]))
    with pytest.raises(RuntimeError, match="corrupt"):
        store.read("merge", "k")


def test_a_worker_reads_its_last_artifact_as_fast_as_its_first(tmp_path: Path) -> None:
    """Peer: the first 200 of 1200 tiny artifacts; of each 200, the best of three workers. The cache's size is kept
    up, not added up at each miss."""
    store = Store(tmp_path)
    blob = save({f"w{i}": torch.zeros(4) for i in range(40)})
    store.put("merge", "0" * 40, blob, {})
    meta, catalog = store.meta("merge", "0" * 40), load_catalog()
    store.read = lambda kind, key: (blob, meta)  # type: ignore[method-assign]

    def some(bench: Bench, start: int) -> float:
        began = time.process_time()
        for i in range(start, start + 200):
            bench.read("merge", f"{i:040x}")
        return time.process_time() - began

    workers = [Bench(store, catalog, torch.device("cpu")) for _ in range(3)]
    spent = [min(some(worker, 200 * i) for worker in workers) for i in range(6)]
    assert spent[-1] < 3 * spent[0] + 0.02, spent


def _tiny_merges(store: Store, number: int) -> tuple[list[Step], dict[str, str]]:
    """Merges of two experts of ten tensors of 16 entries, each with a coefficient of its own; kinds of their inputs."""
    catalog = load_catalog()
    inputs = (("base", "0" * 40), ("expert:a", "1" * 40), ("expert:b", "2" * 40))
    kinds = {key: "base" if role == "base" else "expert" for role, key in inputs}
    for seed, (key, kind) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        store.put(kind, key, save({f"w{i}": torch.randn(4, 4) for i in range(10)}), {})
    backbone = make_ref(catalog.get("backbone", "mini/vit"), {}, "backbone", catalog)
    entry, found = catalog.get("merging", "task_arithmetic"), []
    for i in range(number):
        merging = make_ref(entry, {"scaling": (i + 1) / number}, "merging", catalog)
        parts = (("backbone", backbone), ("merging", merging))
        key = step_key("merge", [("merging", merging.text)], inputs, "{}")
        found.append(Step(key, "merge", parts, inputs, "{}"))
    return found, kinds


def test_a_tiny_step_costs_little_beyond_its_work_and_the_last_as_little_as_the_first(tmp_path: Path) -> None:
    """Peer: the merge, and two files of its bytes that appear whole or not at all. Around that: seeds, checks of
    inputs and results, digests, facts. In turns, and of the turns the median: what a file costs is the machine's."""
    store, other = Store(tmp_path / "store"), tmp_path / "peer"
    steps, kinds = _tiny_merges(store, 400)
    bench = Bench(store, load_catalog(), torch.device("cpu"))

    def done(some: list[Step]) -> float:
        began = time.process_time()
        for step in some:
            blob, facts = run(step, bench, kinds)
            store.put("merge", step.key, blob, {**facts, "seconds": 0.001})
        return time.process_time() - began

    def merged(some: list[Step]) -> float:
        works = [Work(step, bench, kinds) for step in some]
        began = time.process_time()
        for work in works:
            made = merge(work)
            write_atomic(other / f"{work.step.key}.safetensors", parts_of(packed(made.tensors)), False)
            write_atomic(other / f"{work.step.key}.json", json.dumps(dict(made.facts)).encode(), False)
        return time.process_time() - began

    merged(steps[:20])
    done(steps[:20])
    turns = [(done(some), merged(some)) for some in (steps[i : i + 38] for i in range(20, 400, 38))]
    found = statistics.median(ours / peer for ours, peer in turns)
    assert found < 1.5, (found, turns)
    first, last = (min(ours for ours, _ in some) for some in (turns[:3], turns[-3:]))
    assert last < 2 * first + 0.01, turns
    assert len(store.keys()) == 403


def test_inputs_are_looked_at_again_in_less_time_than_hashing_them_takes(tmp_path: Path) -> None:
    """Peer: SHA-256 of the same bytes."""
    bench = Bench(Store(tmp_path), load_catalog(), torch.device("cpu"))
    weights = torch.randn(4_000_000)
    key = bench.give({"w": weights})
    assert bench.touched(key) == ""
    found = ratio(lambda: bench.touched(key), lambda: hashlib.sha256(weights.numpy().data).digest())
    assert found < 1.0, found
    weights.numpy()[-1] += 1
    assert bench.touched(key) == "w"


def test_a_preset_is_composed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peer: Hydra, as for a preset with an override."""
    monkeypatch.setenv("MERGESEC_CACHE", str(tmp_path))
    first = load_grid("quickstart")
    assert load_grid("quickstart") == first == load_grid("quickstart", ["name=quickstart"])
    found = ratio(lambda: load_grid("quickstart"), lambda: load_grid("quickstart", ["name=quickstart"]), 3)
    assert found < 0.6, found
