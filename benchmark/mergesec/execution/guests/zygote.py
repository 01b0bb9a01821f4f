"""A process with Python, torch and the catalogue loaded, and nothing else: guests are forked from it.

It never imports a plugin, and each guest is a copy of it as it was at its start, so no two guests share more than
what everybody has. ``python -m mergesec.execution.guests.zygote SOCKET WORDS``, by a worker.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import time
from typing import Any

from mergesec.execution.guests.wire import Ended, Message, receive, send


def main(number: int, words: int) -> None:
    """Get ready, say so, then fork a guest at every order until the worker is gone."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    control = socket.socket(fileno=number)
    setting = receive(control).said

    import torch

    from mergesec.execution.guests import guest
    from mergesec.planning.catalog import load_catalog

    torch.set_num_threads(setting["threads"])
    torch.use_deterministic_algorithms(True, warn_only=True)
    catalog = load_catalog(setting["plugins"])
    send(control, {"ready": os.getpid()})
    while True:
        try:
            said, file = receive(control)
        except Ended:
            return
        if "end" in said:
            send(control, _ended(int(said["end"]), float(said["patience"]), bool(said["contained"])))
            continue
        output = receive(control).file
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child:
            os.close(file)
            os.close(output)
            send(control, {"pid": child})
            continue
        control.close()
        line = socket.socket(fileno=file)
        with contextlib.suppress(Ended):
            _settle(output, words)
            order = _behind_walls(line, receive(line))
            guest.serve(line, catalog, torch.device(setting["device"]), order)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)


def _settle(output: int, words: int) -> None:
    """What the guest prints goes where the worker reads it, its stacks go to ``words``; it reads nothing; it ends
    with the zygote."""
    _die_with_parent()
    faulthandler.enable(words)
    faulthandler.register(signal.SIGUSR1, words)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _behind_walls(line: socket.socket, order: Message) -> Message:
    """The order, read where its work is to be done: behind walls if it asks for them."""
    from mergesec.execution.guests.containment import Walls, enter

    asked = order.said["walls"]
    if asked is not None:
        try:
            enter(Walls(tuple(asked["seen"]), tuple(asked["hidden"])))
        except OSError as error:
            send(line, {"error": f"cannot be contained here: {error.strerror}", "trace": ""})
            raise Ended from None
        os.environ["HOME"] = "/tmp"
    return order


def _ended(child: int, patience: float, contained: bool) -> dict[str, Any]:
    """How a guest ended: exit code (negative: the signal), and its peak memory, MiB, as the system counted it."""
    end = time.monotonic() + patience
    killed = False
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            unit = 2**20 if sys.platform == "darwin" else 2**10
            return {"code": os.waitstatus_to_exitcode(status), "peak_mb": usage.ru_maxrss / unit}
        if time.monotonic() >= end:
            # who waits at the walls takes a word, and counts what the guest used
            os.kill(child, signal.SIGTERM if contained and not killed else signal.SIGKILL)
            killed, end = True, time.monotonic() + 2.0
        time.sleep(0.002)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
