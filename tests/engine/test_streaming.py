"""``bench merge``: the same result as in memory, in the memory of a few tensors, and nothing lost on error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergesec.cli.main import main
from mergesec.contracts import ContractError, Expert
from mergesec.errors import UsageError
from mergesec.planning.catalog import Entry, load_catalog
from mergesec.streaming.mapped import LazyWeights
from mergesec.streaming.merging import context, merge_files, unfit
from mergesec.streaming.reading import open_weights
from mergesec.tensorwise import TensorwiseMerge

Tensors = dict[str, torch.Tensor]


def network(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """A small network with whatever a checkpoint may hold: matrices, vectors, scalars, nothing, integers."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(1000 + seed)

    def draw(*shape: int) -> torch.Tensor:
        common = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))
        own = torch.randn(shape, generator=generator) + torch.randn(shape, generator=noise)
        return (common + 0.1 * own).to(dtype)

    return {
        "layers.0.attention.weight": draw(24, 16),
        "layers.0.attention.bias": draw(24),
        "layers.1.mlp.weight": draw(16, 40),
        "scale": draw(),
        "none": torch.empty(0, 4, dtype=dtype),
        "odd": draw(3),
        "position_ids": torch.arange(9),
        "mask": torch.tensor([True, False, True]),
    }


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Path]]]:
    """Writes a base and experts; their paths."""

    def write(count: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Path, dict[str, Path]]:
        base = tmp_path / "base.safetensors"
        save_file(network(0, dtype), base, metadata={"format": "pt", "origin": "somewhere"})
        experts = {}
        for index in range(count):
            experts[f"task{index}"] = tmp_path / f"expert{index}.safetensors"
            save_file(network(index + 1, dtype), experts[f"task{index}"])
        return base, experts

    return write


def streaming() -> list[Entry]:
    found = []
    for entry in load_catalog():
        card = entry.card
        if card.kind == "merging" and unfit(entry.load(), card.output, card.wraps) is None:
            found.append(entry)
    return found


def create(entry: Entry) -> TensorwiseMerge:
    """The method at its trial's values; an expert that it wants named is the first of those that are written here."""
    named = {"safe": "task0"} if "safe" in entry.card.parameters else {}
    method = entry.create(entry.card.bind(entry.card.name, {**entry.card.trial, **named}))
    assert isinstance(method, TensorwiseMerge)
    return method


def opened(base: Path, experts: Mapping[str, Path]) -> tuple[Any, dict[str, Any]]:
    return open_weights(base, "--base"), {n: open_weights(p, n) for n, p in experts.items()}


def test_the_plain_methods_stream() -> None:
    names = {entry.card.name for entry in streaming()}
    assert names >= {"simple_average", "weighted_average", "task_arithmetic", "ties", "dare", "magmax"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entry", streaming(), ids=lambda entry: entry.card.name)
def test_files_give_what_memory_gives(entry: Entry, dtype: torch.dtype, files: Any, tmp_path: Path) -> None:
    base, experts = files(2 if entry.card.experts[1] == 2 else 3, dtype)
    members = [Expert(name, load_file(path)) for name, path in experts.items()]
    wanted = create(entry).merge(load_file(base), members, context(entry.card.name, 7)).shared
    weights, lazy = opened(base, experts)
    written = merge_files(create(entry), weights, lazy, tmp_path / "out.safetensors", seed=7)
    found = load_file(written.files[0])
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert not torch.equal(found["layers.1.mlp.weight"], load_file(base)["layers.1.mlp.weight"])


def leaves(seed: int, dtypes: Sequence[torch.dtype]) -> Tensors:
    """Three hundred small tensors, nothing else; their types in turn."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{i}.weight": torch.randn(1 + i % 5, 3, generator=generator).to(dtypes[i % len(dtypes)])
        for i in range(300)
    }


PLAIN = [e for e in streaming() if e.load().pointwise and e.load().whole is TensorwiseMerge.whole]
FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize("types", [[[FLOAT], [FLOAT]], [[HALF], [FLOAT]], [[FLOAT, HALF], [FLOAT]]])
@pytest.mark.parametrize("entry", PLAIN, ids=lambda e: e.card.name)
def test_small_tensors_that_lie_together_are_read_together(
    entry: Entry, types: list[list[torch.dtype]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as in memory, whether they lie in the same order in every file (of one type) or not."""
    names = ["base", "a", "b"]
    base, *experts = [leaves(0, types[0]), *(leaves(i, types[-1]) for i in (1, 2))]
    for name, weights in zip(names, [base, *experts], strict=True):
        save_file(weights, tmp_path / f"{name}.safetensors")
    first, *others = [open_weights(tmp_path / f"{name}.safetensors", name) for name in names]
    seen: list[str] = []
    first.watch = seen.append
    looks: list[int] = []
    alone = LazyWeights._small
    monkeypatch.setattr(LazyWeights, "_small", lambda self, extent: looks.append(1) or alone(self, extent))
    merge_files(create(entry), first, dict(zip("ab", others, strict=True)), tmp_path / "out.safetensors")
    assert set(seen) == set(base)
    assert (len(looks) < 10) == (len(types[0]) == 1)
    inside = create(entry).merge(
        base, [Expert(n, w) for n, w in zip("ab", experts, strict=True)], context(entry.card.name, 0)
    )
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], inside.shared[name]) for name in base)
    assert all(found[name].dtype == tensor.dtype for name, tensor in base.items())


def test_a_run_is_small_tensors_of_one_type_without_gaps(tmp_path: Path) -> None:
    held = {f"w{i}": torch.randn(2, 3) for i in range(4)}
    save_file({**held, "z": torch.randn(1 << 15), "half": torch.ones(3).half()}, tmp_path / "w.safetensors")
    weights = open_weights(tmp_path / "w.safetensors", "weights")
    found = weights.run(["w0", "w1", "w2"])
    assert found is not None
    assert torch.equal(found, torch.cat([held[f"w{i}"].flatten() for i in range(3)]))
    for names in (["w0", "w2"], ["w1", "w0"], ["w3", "z"], ["z"], ["w3", "half"]):
        assert weights.run(names) is None
    save_file(held, tmp_path / "w.safetensors")
    with pytest.raises(ContractError, match="changed while"):
        weights.run(["w0", "w1"])


def test_shards_in_and_out(files: Any, tmp_path: Path) -> None:
    """A merge written in shards, and one whose inputs are shards, equal the merge in one file."""
    base, experts = files()
    plain, sharded, again = tmp_path / "plain.safetensors", tmp_path / "sharded", tmp_path / "again"
    method = create(load_catalog().get("merging", "ties"))
    weights, lazy = opened(base, experts)
    merge_files(method, weights, lazy, plain)
    written = merge_files(method, weights, lazy, sharded, shard_size=2000)
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(load_file(base))
    assert index["metadata"]["total_size"] == weights.size
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert [path.name for path in written.files] == [*shards, "model.safetensors.index.json"]
    together: Tensors = {}
    for shard in shards:
        together.update(load_file(sharded / shard))
    whole = load_file(plain)
    assert set(together) == set(whole)
    assert all(torch.equal(together[name], whole[name]) for name in whole)

    from_shards, lazy = opened(sharded, {"a": sharded, "b": plain})
    average = create(load_catalog().get("merging", "simple_average"))
    merge_files(average, from_shards, lazy, again)
    assert all(torch.equal(t, whole[name]) for name, t in load_file(again / "model.safetensors").items())


def test_metadata_and_alignment(files: Any, tmp_path: Path) -> None:
    base, experts = files(2, torch.bfloat16)
    method = create(load_catalog().get("merging", "simple_average"))
    weights, lazy = opened(base, experts)
    out = tmp_path / "out.safetensors"
    merge_files(method, weights, lazy, out, metadata={"mergesec": "x"})
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "origin": "somewhere", "mergesec": "x"}
    for place in open_weights(out, "out").extents.values():
        assert place.start % place.dtype.itemsize == 0


def test_tied_weights_stored_once(files: Any, tmp_path: Path) -> None:
    """What ``save_model`` leaves of tied weights is one name; an expert with both is told apart by name."""
    base, experts = files(2)
    method = create(load_catalog().get("merging", "simple_average"))
    both = {**load_file(experts["task1"]), "head": load_file(experts["task1"])["scale"].clone()}
    save_file(both, experts["task1"])
    weights, lazy = opened(base, experts)
    with pytest.raises(
        UsageError, match=r"'task1' \(.*expert1.safetensors\): tensor 'head' is not in the base"
    ):
        merge_files(method, weights, lazy, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_lazy_weights_know_their_layout_without_reading(files: Any) -> None:
    base, _ = files(1)
    lazy, whole = open_weights(base, "base"), load_file(base)
    assert lazy.lazy
    assert len(lazy) == len(whole)
    assert "scale" in lazy and "other" not in lazy
    for name, tensor in whole.items():
        assert (lazy.extents[name].shape, lazy.extents[name].dtype) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(lazy[name], tensor)
    first = lazy["layers.0.attention.weight"]
    first.zero_()  # a private mapping: neither the file nor the next access changes
    assert torch.equal(lazy["layers.0.attention.weight"], whole["layers.0.attention.weight"])


def test_a_file_that_changes_meanwhile_is_noticed(files: Any, tmp_path: Path) -> None:
    base, experts = files(2)
    weights, lazy = opened(base, experts)
    method = create(load_catalog().get("merging", "simple_average"))
    save_file({**network(5), "more": torch.ones(2)}, experts["task0"])
    with pytest.raises(UsageError, match="changed while it was being read"):
        merge_files(method, weights, lazy, tmp_path / "out.safetensors")


@pytest.mark.parametrize("what", ["raise", "nan", "interrupt"])
def test_a_failed_merge_leaves_what_was_there(what: str, files: Any, tmp_path: Path) -> None:
    base, experts = files(2)
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"earlier")
    weights, lazy = opened(base, experts)

    class Failing(type(create(load_catalog().get("merging", "simple_average")))):  # type: ignore[misc]
        pointwise = False

        def combine(self, piece: Any, out: torch.Tensor, facts: Any) -> None:
            super().combine(piece, out, facts)
            if piece.name == "layers.1.mlp.weight":
                if what == "nan":
                    out[3] = torch.nan
                else:
                    raise KeyboardInterrupt if what == "interrupt" else ContractError("no")

    method = Failing()
    method.name = "failing"
    wanted: Any = {"raise": ContractError, "nan": ContractError, "interrupt": KeyboardInterrupt}[what]
    with pytest.raises(wanted):
        merge_files(method, weights, lazy, out, force=True)
    assert out.read_bytes() == b"earlier"
    assert not list(tmp_path.glob(".tmp*"))


def test_force_replaces_an_earlier_result_whole(files: Any, tmp_path: Path) -> None:
    """Shards of the earlier result that the new one does not have go away."""
    base, experts = files(2)
    out = tmp_path / "merged"
    out.mkdir()
    (out / "config.json").write_text("{}")
    method = create(load_catalog().get("merging", "simple_average"))
    weights, lazy = opened(base, experts)
    merge_files(method, weights, lazy, out, shard_size=1000)
    with pytest.raises(UsageError, match=r"exists; --force"):
        merge_files(method, weights, lazy, out)
    merge_files(method, weights, lazy, out, force=True)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


# --------------------------------------------------------------------------- the verb

Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """``bench`` in this process and in a folder of its own: (exit code, output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_verb_merges(files: Any, invoke: Invoke, tmp_path: Path) -> None:
    files(2)
    inputs = [
        "--base",
        "base.safetensors",
        "--expert",
        "a=expert0.safetensors",
        "--expert",
        "b=expert1.safetensors",
    ]
    code, out, _ = invoke("merge", "task_arithmetic", "scaling=5e-1", *inputs, "--out", "merged.safetensors")
    assert code == 0
    assert out.splitlines()[0] == "merged.safetensors"
    base, found = load_file("base.safetensors"), load_file("merged.safetensors")
    moved = [load_file(f"expert{i}.safetensors")["scale"] - base["scale"] for i in range(2)]
    torch.testing.assert_close(found["scale"], base["scale"] + 0.5 * (moved[0] + moved[1]))
    with safe_open("merged.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["mergesec"])
    assert (facts["method"], facts["experts"], facts["parameters"]["scaling"]) == (
        "task_arithmetic",
        ["a", "b"],
        0.5,
    )


BASE = ["--base", "base.safetensors"]
ONE = ["--expert", "a=expert0.safetensors"]
GOOD = [*BASE, *ONE, "--expert", "b=expert1.safetensors"]
OUT = ["--out", "out.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tis", *GOOD, *OUT], "did you mean 'ties'"),
        (["adamerging", *GOOD, *OUT], "adamerging"),
        (["ties", "keap=0.1", *GOOD, *OUT], "did you mean 'keep'"),
        (["ties", "keep=3", *GOOD, *OUT], "outside"),
        (["ties", "keep", *GOOD, *OUT], "not key=value"),
        (["ties", "keep=[", *GOOD, *OUT], "keep"),
        (["ties", "keep=0.1", "keep=0.2", *GOOD, *OUT], "twice"),
        (["ties", "scaling=tuned", *GOOD, *OUT], "scaling"),
        (["weighted_average", "weights=[1,2,3]", *GOOD, *OUT], "3 weights for 2 experts"),
        (["ties", *ONE, *OUT], "--base"),
        (["ties", *BASE, *OUT], "--expert"),
        (["ties", *GOOD], "--out"),
        (["ties", *BASE, "--expert", "=expert0.safetensors", *OUT], "neither NAME=PATH nor a path"),
        (["ties", *BASE, *ONE, *ONE, *OUT], "two experts are called 'a'"),
        (["ties", *BASE, "--expert", "a=absent.safetensors", *OUT], "absent.safetensors"),
        (["ties", *BASE, "--expert", "a=pickled.bin", *OUT], "pickle"),
        (["ties", *BASE, "--expert", "a=pickles", *OUT], "pickles"),
        (["ties", *BASE, "--expert", "a=empty", *OUT], "neither model.safetensors"),
        (["ties", *BASE, "--expert", "a=cut.safetensors", *OUT], "cut.safetensors is not a whole safetensors file"),
        (["ties", *BASE, "--expert", "a=text.safetensors", *OUT], "text.safetensors is not a whole"),
        (["ties", *BASE, "--expert", "a=other.safetensors", *OUT], "'a' (other.safetensors): tensor 'scale'"),
        (["ties", *BASE, "--expert", "a=shape.safetensors", *OUT], "tensor 'odd' has shape [5]"),
        (["ties", *BASE, "--expert", "a=typed.safetensors", *OUT], "tensor 'odd' is torch.int64"),
        (["ties", *BASE, "--expert", "a=lost", *OUT], "model-00001.safetensors"),
        (["ties", *GOOD, "--out", "there.safetensors"], "exists; --force"),
        (["ties", *GOOD, "--out", "base.safetensors", "--force"], "one of the inputs"),
        (["ties", *GOOD, "--out", "text"], "name a .safetensors file or a folder"),
        (["ties", *GOOD, "--out", "pickled.bin/x"], "--out"),
        (["ties", *GOOD, *OUT, "--shard-size", "2GB"], "--shard-size"),
        (["ties", *GOOD, "--out", "folder", "--shard-size", "big"], "such as 5GB"),
        (["ties", *GOOD, *OUT, "--threads", "0"], "--threads"),
    ],
    ids=lambda value: "-".join(value[:3]) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_one_line(arguments: list[str], expected: str, files: Any, invoke: Invoke) -> None:
    files(2)
    plain = network(1)
    Path("there.safetensors").write_bytes(b"mine")
    Path("text").write_text("words")
    Path("text.safetensors").write_text("words, not tensors")
    Path("pickled.bin").write_bytes(b"\x80\x04.")
    Path("pickles").mkdir()
    Path("pickles", "pytorch_model.bin").write_bytes(b"\x80\x04.")
    Path("lost").mkdir()
    Path("empty").mkdir()
    index = {"weight_map": {"scale": "model-00001.safetensors"}}
    Path("lost", "model.safetensors.index.json").write_text(json.dumps(index))
    Path("cut.safetensors").write_bytes(Path("base.safetensors").read_bytes()[:-100])
    save_file({n: t for n, t in plain.items() if n != "scale"}, "other.safetensors")
    save_file({**plain, "odd": torch.ones(5)}, "shape.safetensors")
    save_file({**plain, "odd": torch.ones(3, dtype=torch.int64)}, "typed.safetensors")
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    code, _, err = invoke("merge", *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert expected in err
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before
