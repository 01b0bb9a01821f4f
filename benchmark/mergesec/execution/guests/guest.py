"""The inside of a guest: one piece of foreign work, with what the worker hands over for it and nothing else."""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mergesec.contracts import Attack, ContractError, Defense, MergeMethod, Model
from mergesec.execution.evaluation import network_of, serves_itself
from mergesec.execution.failures import explain
from mergesec.execution.guests.batches import from_bytes, to_bytes
from mergesec.execution.guests.wire import Message, copied, mapped, receive, send, sheet
from mergesec.execution.steps import run
from mergesec.execution.store import Blob, CorruptArtifact, Store
from mergesec.execution.work import Bench, Work
from mergesec.planning.catalog import Catalog
from mergesec.planning.plan import Step
from mergesec.planning.refs import Ref


class Brokered(Store):
    """A store as a guest sees it: the inputs of its step as the worker hands them over, and its checkpoints."""

    def __init__(self, line: socket.socket) -> None:
        super().__init__(Path(os.devnull))
        self._line = line

    def ask(self, said: Mapping[str, Any], file: int = -1) -> Message:
        send(self._line, said, file)
        return receive(self._line)

    def read(self, kind: str, key: str) -> tuple[bytes | mmap.mmap, dict[str, Any]]:
        said, file = self.ask({"read": key})
        if file < 0:
            raise CorruptArtifact(key)
        return mapped(file), said

    def open(self, kind: str, key: str) -> tuple[Path, dict[str, Any]]:
        raise CorruptArtifact(key)  # nothing of the disk is at hand here

    def kept(self, key: str, number: int) -> mmap.mmap | None:
        file = self.ask({"kept": number}).file
        return None if file < 0 else mapped(file)

    def keep(self, key: str, number: int, blob: Blob) -> None:
        file = sheet(blob)
        try:
            self.ask({"keep": number}, file)
        finally:
            os.close(file)


class GuestBench(Bench):
    """A bench whose tasks load nothing: their rows come from the worker."""

    may_load = False

    def component(self, ref: Ref) -> Any:
        made = super().component(ref)
        if ref.kind == "task" and not self.may_load:
            made.load = _refuse
        return made


def _refuse(*_: Any) -> Any:
    raise ContractError("load: a task's rows are handed over; hooks do not load data")


def serve(line: socket.socket, catalog: Catalog, device: torch.device, order: Message) -> None:
    """Do the piece of work that ``order`` names; its error, or what came of it, goes back over ``line``."""
    try:
        # this one way round: the worker is trusted here
        step, kinds = pickle.loads(copied(order.file))
        bench = GuestBench(
            Brokered(line), catalog, device, report=lambda text: send(line, {"note": text}),
            checkpoint_seconds=float(order.said["checkpoint_seconds"]),
        )  # fmt: skip
        if step.kind == "data":
            bench.may_load = True
            bench.data_root = Path(order.said["data_root"]) if order.said["data_root"] else None
        _JOBS[order.said["do"]](line, step, bench, kinds)
    except BaseException as error:  # a component may raise anything, SystemExit included
        reason, trace = explain(error)
        sys.stdout.flush()
        send(line, {"error": reason, "trace": trace})


def _step(line: socket.socket, step: Step, bench: Bench, kinds: Mapping[str, str]) -> None:
    """A whole step."""
    blob, facts = run(step, bench, kinds)
    _answer(line, {"facts": facts}, blob)


def _network(line: socket.socket, step: Step, bench: Bench, kinds: Mapping[str, str]) -> None:
    """Networks that a method makes itself: says whether it does, then features batch by batch."""
    work = Work(step, bench, kinds)
    producer: MergeMethod | Defense = work.component("producer")
    own = serves_itself(producer)
    _answer(line, {"serves": own})
    model: Model | None = None
    while own:
        said, file = receive(line)
        if "network" in said:
            network = network_of(work, said["role"], said["network"], producer, said["cast"])
            model = Model(work.backbone, network)
            _answer(line, {})
        elif model is not None:
            with torch.inference_mode():
                found = model.features(from_bytes(copied(file), bench.device))
            _answer(line, {}, to_bytes(found))


def _trigger(line: socket.socket, step: Step, bench: Bench, kinds: Mapping[str, str]) -> None:
    """An attack's trigger, put on batch by batch."""
    work = Work(step, bench, kinds)
    attack: Attack = work.component("attack")
    arrays = work.tensors("trigger")
    _answer(line, {})
    while True:
        batch = from_bytes(copied(receive(line).file), bench.device)
        with torch.inference_mode():
            _answer(line, {}, to_bytes(attack.apply(arrays, batch)))


_JOBS: dict[str, Callable[[socket.socket, Step, Bench, Mapping[str, str]], None]] = {
    "step": _step,
    "network": _network,
    "trigger": _trigger,
}


def _answer(line: socket.socket, said: Mapping[str, Any], blob: Blob | None = None) -> None:
    sys.stdout.flush()  # the worker ends the guest as soon as it has what it wants
    sys.stderr.flush()
    file = -1 if blob is None else sheet(blob)
    try:
        send(line, {"answer": said}, file)
    finally:
        if file >= 0:
            os.close(file)
