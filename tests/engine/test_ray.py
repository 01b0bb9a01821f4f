"""Ray: a cluster of two nodes on this machine, one of which is lost; a driver that dies; what is asked of a node."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from engine_runs import at_naps, comparable, napping, wait_for

from mergesec.errors import UsageError
from mergesec.execution.engines import on_ray
from mergesec.execution.engines.engine import Ways
from mergesec.execution.engines.on_ray import GB, Needs, RayEngine
from mergesec.planning.engines import EngineSpec


def test_needs_say_how_many_steps_a_node_has_room_for() -> None:
    node = {"CPU": 16.0, "GPU": 2.0, "memory": 64 * GB}
    assert Needs(1, 0, 0).fit(node) == 16
    assert Needs(1, 1, 0).fit(node) == 2
    assert Needs(1, 0.25, 0).fit(node) == 8
    assert Needs(1, 0.1, 0).fit(node) == 16
    assert Needs(2, 0.25, 20 * GB).fit(node) == 3
    assert Needs(1, 1, 0).fit({"CPU": 4.0}) == 0
    assert str(Needs(2, 0.25, 20 * GB)) == "2 CPU, 0.25 GPU, 20 GB of memory"


@pytest.mark.parametrize(
    ("spec", "device", "gpus", "needs"),
    [
        ({}, "auto", 0, Needs(1, 0, 0)),
        ({}, "auto", 4, Needs(1, 1, 0)),
        ({}, "cpu", 4, Needs(1, 0, 0)),
        ({"gpus": 0.5, "cpus": 2, "memory": 8}, "cuda", 4, Needs(2, 0.5, 8 * GB)),
        ({"gpus": 0.5}, "cpu", 4, Needs(1, 0, 0)),
        ({}, "cuda*4", 2, Needs(1, 0.25, 0)),
        ({"gpus": 1}, "cuda*4", 2, Needs(1, 1, 0)),
    ],
)
def test_a_step_takes_a_gpu_where_there_is_one(spec: Any, device: str, gpus: float, needs: Needs) -> None:
    resources = {"CPU": 8.0, "GPU": gpus} if gpus else {"CPU": 8.0}
    assert on_ray._needs(EngineSpec(name="ray", **spec), Ways(device), resources) == needs


def test_a_gpu_that_no_node_has_is_an_error() -> None:
    with pytest.raises(UsageError, match="the Ray cluster has no GPU"):
        on_ray._needs(EngineSpec(name="ray"), Ways("cuda"), {"CPU": 8.0})


@pytest.mark.parametrize(
    ("address", "hint"),
    [("nowhere", "write host:port"), ("localhost:x", "write host:port"), ("127.0.0.1:{closed}", "refused")],
)
def test_an_address_where_nobody_listens_is_named(address: str, hint: str) -> None:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))  # not listening
        address = address.replace("{closed}", str(door.getsockname()[1]))
        with pytest.raises(UsageError, match=f"--address: no Ray cluster at '{address}'.*{hint}"):
            RayEngine(EngineSpec(name="ray", address=address), Ways())


def test_a_lost_node_or_worker_is_no_failure_of_the_step() -> None:
    exceptions = pytest.importorskip("ray.exceptions", reason="needs pip install 'mergesec[ray]'")
    told = {
        exceptions.NodeDiedError("gone"): ("died", "its node was lost"),
        exceptions.WorkerCrashedError(): ("died", "the worker ended while running it"),
        exceptions.OutOfMemoryError("full"): ("died", "out of memory"),
        KeyError("x"): ("error", "KeyError"),
    }
    for error, (status, words) in told.items():
        future: Future[Any] = Future()
        future.set_exception(error)
        answer = on_ray._answer(future)
        assert answer.status == status
        assert words in answer.message


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes of one core each, on this machine."""
    pytest.importorskip("ray", reason="needs pip install 'mergesec[ray]'")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000}
    found = Cluster(initialize_head=True, head_node_args=node)
    found.spare = found.add_node(num_cpus=1, object_store_memory=80_000_000)
    yield found
    found.shutdown()


def test_a_killed_driver_goes_on_and_a_lost_node_costs_its_running_steps(bench: Any, cluster: Any) -> None:
    arguments = [*napping(bench, "ray", 3), "--engine", "ray", "--address", cluster.address]
    driver = bench.start("run", *arguments)
    wait_for(lambda: len(at_naps(bench.store)) == 2)
    driver.kill()
    driver.communicate()
    kept = {path: path.stat().st_mtime_ns for path in bench.store.glob("artifacts/*/*.json")}
    second = bench.start("run", *arguments)
    wait_for(lambda: [lease["process"] for lease in at_naps(bench.store)] == [second.pid] * 2)
    cluster.remove_node(cluster.spare, allow_graceful=False)
    (bench.home / "go").touch()
    out, err = second.communicate(timeout=200)
    assert second.returncode == 0, out + err
    assert "3 of 3 cells done" in out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # nothing was done twice
    assert not list((bench.store / "claims").glob("*.lease"))
    assert not list(bench.store.rglob("*.pkl"))


def test_all_engines_leave_the_same_records(bench_class: Any, tmp_path: Any) -> None:
    pytest.importorskip("ray", reason="needs pip install 'mergesec[ray]'")
    pytest.importorskip("submitit", reason="needs pip install 'mergesec[slurm]'")
    found = {}
    for engine, more in {
        "local": ("--jobs", "2"),
        "ray": ("--jobs", "2"),
        "slurm": ("--workers", "2", "--slurm", "cluster=local"),
    }.items():
        home = tmp_path / engine
        home.mkdir()
        runner = bench_class(home)
        grid = runner.grid(
            "same", engine=engine, axes={"attacks": ["none", "badnets"], "adversary": ["micro/bars"]}
        )
        ran = runner.run(grid, *more)
        assert ran.code == 0, ran.err
        found[engine] = comparable(runner.results / "records" / "same"), runner.boards("same")
    assert len(found["local"][0]) >= 6
    assert found["local"] == found["ray"]
    assert found["local"] == found["slurm"]
