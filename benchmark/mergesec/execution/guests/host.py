"""A worker's side of its guests: forks them, hands over what a step's side may see, checks what comes back."""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from mergesec.contracts import ContractError, Model
from mergesec.execution.failures import portable
from mergesec.execution.guests.batches import from_bytes, to_bytes
from mergesec.execution.guests.checks import check
from mergesec.execution.guests.containment import Walls
from mergesec.execution.guests.handing import handed
from mergesec.execution.guests.wire import Ended, Garbled, Message, copied, receive, send, sheet
from mergesec.execution.logs import Log
from mergesec.execution.store import Blob, Store
from mergesec.execution.work import Result, Work
from mergesec.files import plain
from mergesec.planning.refs import Ref
from mergesec.planning.seeds import SALT

PATIENCE = 5.0
"""Seconds that a guest whose line went dead has to be gone."""
LONGEST_REASON, LONGEST_TRACE = 1000, 100_000
"""Letters of an error that are kept."""


class GuestFailed(RuntimeError):
    """Foreign code raised; ``reason`` is one line, ``trace`` its traceback."""

    def __init__(self, reason: str, trace: str) -> None:
        super().__init__(reason)
        self.reason, self.trace = reason, trace


class GuestDied(RuntimeError):
    """A guest ended while it was at work; ``code`` is its exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a guest ended with {code}")
        self.code = code


@dataclass(frozen=True)
class Setting:
    """What guests are started with; ``walls`` if they are contained."""

    plugins: tuple[str, ...]
    device: str
    threads: int
    data_root: str | None
    walls: Walls | None
    words: int
    """A file descriptor for the stacks of a guest that crashes or is asked for them."""


class Fork(NamedTuple):
    """A guest under way: its process, the line to it, and what it prints."""

    pid: int
    line: socket.socket
    output: int


class Zygote:
    """The process that guests are forked from; started when the first one is needed."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None

    def fork(self) -> Fork:
        """A new guest. Ended if the zygote is gone; the next call starts another."""
        line = self.start()
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe()
        try:
            send(line, {"fork": True}, theirs.fileno())
            send(line, {"output": True}, writing)
            pid = int(receive(line).said["pid"])
        finally:
            theirs.close()
            os.close(writing)
        return Fork(pid, ours, reading)

    def end(self, pid: int, patience: float, contained: bool) -> dict[str, Any]:
        """See a guest end, after ``patience`` seconds by force: its exit ``code`` and ``peak_mb``."""
        line = self.start()
        send(line, {"end": pid, "patience": patience, "contained": contained})
        return receive(line).said

    def start(self) -> socket.socket:
        """The line to the zygote, which is started if it does not live. GuestDied if it cannot be."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._line is None:
            ours, theirs = socket.socketpair()
            module = "mergesec.execution.guests.zygote"
            words = self._setting.words
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(theirs.fileno()), str(words)],
                pass_fds=(theirs.fileno(), words), stdin=subprocess.DEVNULL, env=_environment(), process_group=0,
            )  # fmt: skip
            theirs.close()
            self._line = ours
            told = {
                "plugins": self._setting.plugins,
                "device": self._setting.device,
                "threads": self._setting.threads,
            }
            try:
                send(ours, told)
                receive(ours)
            except Ended:
                code = self._process.wait()
                self.close()
                raise GuestDied(code) from None
        return self._line

    def signal(self, number: int) -> None:
        """Send a signal to all guests."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End it, and with it all its guests."""
        process, line, self._process, self._line = self._process, self._line, None, None
        if line is not None:
            line.close()
        if process is not None:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    """The worker's, without what says where results and data are."""
    hidden = ("MERGESEC_CACHE", "MERGESEC_DATA", "XDG_CACHE_HOME", SALT)
    return {name: value for name, value in os.environ.items() if name not in hidden}


class Hosts:
    """Runs plugins' code in processes of its own: ``work.Guests``."""

    def __init__(self, store: Store, setting: Setting) -> None:
        self._store, self._setting = store, setting
        self._zygote = Zygote(setting)
        self.peak_mb = 0.0
        """Of the largest guest since it was last set."""
        self.log = Log(store.root, "")
        """Where guests print."""

    @property
    def contained(self) -> bool:
        return self._setting.walls is not None

    def start(self) -> None:
        """Get ready for the first guest: loading torch is no part of its step."""
        self._zygote.start()

    def close(self) -> None:
        self._zygote.close()

    def signal(self, number: int) -> None:
        """Send a signal to all guests."""
        self._zygote.signal(number)

    def run(self, work: Work) -> Result:
        with self._guest(work, "step", tuple(work.inputs)) as guest:
            said, blob = guest.hear()
        return check(work, Result(_tensors(blob, work.device), _facts(said, work)))

    @contextlib.contextmanager
    def network(self, work: Work) -> Iterator[ServedNetwork | None]:
        roles = tuple(role for role in ("model", "first", "second") if role in work.inputs)
        with self._guest(work, "network", roles) as guest:
            yield ServedNetwork(guest, work) if guest.hear()[0].get("serves") is True else None

    @contextlib.contextmanager
    def trigger(self, work: Work) -> Iterator[Callable[[Any], Any]]:
        with self._guest(work, "trigger", ("trigger",)) as guest:
            guest.hear()
            yield lambda inputs: from_bytes(guest.ask({}, to_bytes(inputs))[1], work.device)

    @contextlib.contextmanager
    def _guest(self, work: Work, job: str, roles: tuple[str, ...]) -> Iterator[Guest]:
        """A guest for one job of a step, which sees these inputs of it. It ends with the block."""
        fork = self._zygote.fork()
        sent = replace(work.step, inputs=tuple((r, k) for r, k in work.step.inputs if r in roles))
        kinds = {k: "rows" if work.kind_of(r) == "data" else work.kind_of(r) for r, k in sent.inputs}
        order = {
            "do": job, "checkpoint_seconds": work.bench.checkpoint_seconds,
            "data_root": self._setting.data_root if work.step.kind == "data" else None,
            "walls": self._walls(work),
        }  # fmt: skip
        guest = Guest(fork, work, frozenset(roles), self.log)
        patience = 0.0
        try:
            guest.say(order, pickle.dumps((sent, kinds)))
            yield guest
        except Ended:
            patience = PATIENCE  # it is about to be gone, and how tells why
            raise GuestDied(self._end(fork, patience)) from None
        finally:
            guest.drain()
            fork.line.close()
            os.close(fork.output)
            if not patience:
                self._end(fork, patience)

    def _end(self, fork: Fork, patience: float) -> int:
        """Wait for a guest to be gone; its exit code."""
        try:
            ended = self._zygote.end(fork.pid, patience, self.contained)
        except (Ended, Garbled):
            self._zygote.close()
            return -9
        self.peak_mb = max(self.peak_mb, float(ended["peak_mb"]))
        return int(ended["code"])

    def _walls(self, work: Work) -> dict[str, Any] | None:
        """What a contained guest sees of the disk: code, the models that the step's components name, and of data
        only what a plugin's own task is to load; None if it is not contained."""
        walls = self._setting.walls
        if walls is None:
            return None
        models = [place for _, ref in work.step.components for place in places_of(ref)]
        hidden = walls.hidden
        if work.step.kind == "data" and self._setting.data_root:
            models.append(str(Path(self._setting.data_root) / work.refs["task"].name))
            hidden = tuple(h for h in hidden if not Path(models[-1]).is_relative_to(h))
        return {"seen": [*walls.seen, *models], "hidden": hidden}


def places_of(ref: Ref) -> list[str]:
    """Folders and files that a component's parameters name: models of its own, here or in the hub's cache."""
    found = []
    for name, value in ref.parameters:
        if isinstance(value, str) and name in ("path", "model") and value:
            place = Path(value).expanduser()
            found.append(str(place) if place.exists() else hub_folder(value))
    return [place for place in found if place]


def hub_folder(name: str) -> str:
    """Where the hub's client keeps a model; empty if the name is none of the hub's."""
    owner, _, rest = name.partition("@")[0].partition("/")
    home = os.environ.get("HF_HUB_CACHE") or os.path.join(
        os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface"), "hub"
    )
    return os.path.join(home, f"models--{owner}--{rest.partition('/')[0]}") if rest else ""


class Guest:
    """A guest at work for a step: answers what it asks for, and takes what it answers."""

    def __init__(self, fork: Fork, work: Work, roles: frozenset[str], log: Log) -> None:
        self._fork, self._work, self._log = fork, work, log
        self._roles = {key: role for role, key in work.step.inputs if role in roles}

    def ask(self, said: Mapping[str, Any], blob: Blob | None = None) -> tuple[dict[str, Any], bytes]:
        """Say something and wait for the answer."""
        self.say(said, blob)
        return self.hear()

    def say(self, said: Mapping[str, Any], blob: Blob | mmap.mmap | None = None) -> None:
        file = -1 if blob is None else sheet(blob)
        try:
            send(self._fork.line, said, file)
        finally:
            if file >= 0:
                os.close(file)

    def hear(self) -> tuple[dict[str, Any], bytes]:
        """The guest's answer and the bytes with it; what it asks for meanwhile is handed over.

        Ended if it dies, GuestFailed if its code raised, ContractError for what is no answer.
        """
        while True:
            try:
                said, file = self._next()
            except Garbled as error:
                raise ContractError(f"{self._work.step.label}: answers with {error}") from None
            blob = copied(file) if file >= 0 else b""
            if "answer" in said:
                answer = said["answer"]
                if not isinstance(answer, dict):
                    raise ContractError(f"{self._work.step.label}: no answer came back")
                return answer, blob
            if "error" in said:  # in the guest's own words, which are a stranger's
                reason = portable(" ".join(str(said["error"]).split()))
                raise GuestFailed(
                    reason[:LONGEST_REASON], portable(str(said.get("trace", "")))[:LONGEST_TRACE]
                )
            self._attend(said, blob)

    def _next(self) -> Message:
        line, output = self._fork.line, self._fork.output
        while True:
            ready, _, _ = select.select([line.fileno(), output], [], [])
            if line.fileno() in ready or not self._print():  # it closed its output: only the line is left
                return receive(line)

    def _attend(self, said: Mapping[str, Any], blob: bytes) -> None:
        """Hand over an input of the step, keep a checkpoint or give it back, pass a note on."""
        store, key, line = self._work.bench.store, self._work.step.key, self._fork.line
        if isinstance(said.get("note"), str):
            self._work.bench.report(plain(said["note"])[:200])
        elif isinstance(said.get("read"), str):
            role = self._roles.get(said["read"])
            if role is None:
                send(line, {"refused": "no input of this step"})
                return
            found = handed(self._work, role)
            self.say(found.meta, found.blob)
        elif isinstance(said.get("kept"), int):
            kept = store.kept(key, said["kept"])
            self.say({"kept": kept is not None}, kept)
        elif isinstance(said.get("keep"), int):
            store.keep(key, said["keep"], blob)
            send(line, {"keep": True})
        else:
            raise ContractError(f"{self._work.step.label}: asks for {plain(str(said))[:80]}")

    def _print(self) -> bool:
        """Take what it printed; False if it never will print again."""
        text = os.read(self._fork.output, 1 << 16)
        self._log.write(text)
        return bool(text)

    def drain(self) -> None:
        """Take what is left of what it printed."""
        while select.select([self._fork.output], [], [], 0)[0] and self._print():
            pass


class ServedNetwork:
    """A guest that serves a plugin's own networks."""

    def __init__(self, guest: Guest, work: Work) -> None:
        self._guest, self._work = guest, work

    def model(self, role: str, task: str, cast: str) -> Model:
        self._guest.ask({"network": task, "role": role, "cast": cast})
        return ServedModel(self._work.backbone, nn.Identity(), self._guest, self._work.device)


@dataclass
class ServedModel(Model):
    """A model whose features a guest computes."""

    guest: Guest
    device: torch.device

    def features(self, inputs: Any) -> Tensor:
        blob = self.guest.ask({}, to_bytes(inputs))[1]
        found = from_bytes(blob, self.device)
        if not isinstance(found, Tensor) or len(found) != len(inputs):
            raise ContractError(f"a plugin's network gave no features for {len(inputs)} inputs")
        return found


def _tensors(blob: bytes, device: torch.device) -> dict[str, Tensor]:
    try:
        found = load_tensors(blob)
        return {name: found.pop(name).clone().to(device) for name in list(found)}
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ContractError(f"what came back is no safetensors file ({error})") from None


def _facts(said: Mapping[str, Any], work: Work) -> dict[str, Any]:
    facts = said.get("facts")
    if not isinstance(facts, dict):
        raise ContractError(f"{work.step.label}: came back without facts")
    return facts
