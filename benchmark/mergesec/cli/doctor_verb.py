"""``bench doctor``: is this machine fit to run, and if not, what to do."""

from __future__ import annotations

import os
import platform
import shutil
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

import typer

from mergesec.cli import show

if TYPE_CHECKING:
    from mergesec.planning.catalog import Entry


EXTRAS = {
    "transformers": "real", "open_clip_torch": "clip", "fusion-bench": "fusionbench", "numba": "fast",
    "diffusers": "diffusion", "ray": "ray", "submitit": "slurm",
}  # fmt: skip
"""Optional packages → the extra that brings each."""


def main() -> None:
    from mergesec.errors import UsageError
    from mergesec.execution.engines.local import visible_gpus
    from mergesec.execution.guests.containment import survey
    from mergesec.files import check_writable, default_root
    from mergesec.planning.catalog import load_catalog

    rows: list[list[str]] = []
    rows.append(["python", "ok", platform.python_version()])
    for name, needed in (
        ("torch", True),
        ("hydra-core", True),
        *((name, False) for name in EXTRAS),
    ):
        try:
            rows.append([name, "ok", version(name)])
        except PackageNotFoundError:
            extra = EXTRAS.get(name, "")
            rows.append(
                [
                    name,
                    "MISSING" if needed else "absent",
                    f"pip install 'mergesec[{extra}]'" if extra else "reinstall mergesec",
                ]
            )
    try:
        import torch

        rows.append(["torch loads", "ok", f"{torch.get_num_threads()} threads"])
    except Exception as error:
        rows.append(["torch loads", "FAILED", str(error)[:120]])
    from mergesec.compat import ensure_torchvision

    rows.append(["torchvision", "ok", ensure_torchvision()])
    rows.append(["cores", "ok", str(os.cpu_count())])
    rows.append(["GPUs", "ok", ", ".join(visible_gpus()) or "none, CPU only"])
    rows.append(["engines", "ok", ", ".join(_engines())])
    obstacle = survey().obstacle
    rows.append(
        ["plugins", "absent" if obstacle else "ok", f"not contained: {obstacle}" if obstacle else "contained"]
    )
    try:
        check_writable(default_root(), "MERGESEC_CACHE")
        free = shutil.disk_usage(default_root()).free / 1e9
        rows.append(["store", "ok" if free > 2 else "LOW", f"{default_root()}, {free:.0f} GB free"])
    except UsageError as error:
        rows.append(["store", "FAILED", str(error)])
    try:
        catalog = load_catalog()
        entries = list(catalog)
        broken = _broken(entries)
        rows.append(["catalogue", "FAILED" if broken else "ok", broken or f"{len(entries)} components load"])
        for package, count in sorted(Counter(catalog.absent.values()).items()):
            rows.append(["not listed", "absent", f"{count} components need pip install '{package}'"])
    except UsageError as error:
        rows.append(["catalogue", "FAILED", str(error)])
    show.table("", ["what", "", "found"], rows)
    if any(r[1] in ("MISSING", "FAILED") for r in rows):
        raise typer.Exit(1)


def _engines() -> list[str]:
    """What ``bench run --engine`` may name here."""
    found = ["local"]
    if find_spec("ray"):
        found.append(
            f"ray (RAY_ADDRESS={os.environ['RAY_ADDRESS']})" if "RAY_ADDRESS" in os.environ else "ray"
        )
    if find_spec("submitit"):
        found.append("slurm" if shutil.which("sbatch") else "slurm (no sbatch: on this machine)")
    return found


def _broken(entries: list[Entry]) -> str:
    for entry in entries:
        try:
            entry.load()
        except Exception as error:
            return f"{entry.card.kind} {entry.card.name}: {type(error).__name__}: {error}"[:200]
    return ""
