"""``bench scan EXPERT --base BASE``: may this expert be merged? What its weights tell, and how often that is wrong."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergesec.cli.options import DataRoot, Plugins
from mergesec.errors import UsageError
from mergesec.files import is_there, plain

if TYPE_CHECKING:
    from mergesec.api.scans import Scan

VERDICTS = {
    "protected": "protected: do not merge it as it is published",
    "suspicious": "unlike honest experts: look closer before you merge it",
    "changed": "not what a fine-tuning of this base leaves: look closer before you merge it",
    "nothing": "nothing found that speaks against merging it, which is no proof: see what such a scan misses",
}


def main(
    expert: Annotated[
        Path | None,
        typer.Argument(help="a .safetensors file, or a folder with one, with shards or an adapter"),
    ] = None,
    base: Annotated[str | None, typer.Option(help="the base: the same, or a backbone's name")] = None,
    against: Annotated[
        list[Path] | None, typer.Option(help="an expert that it would be merged with; once per expert")
    ] = None,
    task: Annotated[str | None, typer.Option(help="look at it on this task's tuning rows")] = None,
    data: Annotated[
        Path | None, typer.Option(help="folder of images or table of texts: the task's rows")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="what the base is, where no config.json says it")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="attention heads, where nothing else says how many")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="table of honest experts of this base")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
    check: Annotated[bool, typer.Option("--check", help="exit with 1 if anything speaks against it")] = False,
    calibrate: Annotated[
        str | None, typer.Option(help="measure a grid's experts instead, and write a table to --out")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="where the table goes")] = None,
    cached: Annotated[
        bool, typer.Option("--cached", help="with --calibrate: only what the store has")
    ] = False,
    data_root: DataRoot = None,
    plugin: Plugins = None,
) -> None:
    from mergesec.api import scans

    desk: dict[str, Any] = {"plugins": plugin or (), "data_root": data_root}
    if calibrate is not None:
        if expert is not None or out is None:
            raise UsageError("--calibrate", "takes no EXPERT, and needs --out FILE.json")
        table = scans.calibrate(
            calibrate, out, cached=cached, report=lambda text: print(plain(text), file=sys.stderr), **desk
        )
        print(f"{len(table.specimens)} experts, {len(table.honest)} of them honest: {plain(str(out))}")
        return
    if expert is None or base is None:
        missing = "EXPERT" if expert is None else "--base"
        raise UsageError(missing, "is needed; bench scan EXPERT --base BASE")
    found = scans.scan(
        expert, base, against={str(path): path for path in against or ()}, backbone=backbone, heads=heads,
        task=_task(task, data), reference=reference, **desk,
    )  # fmt: skip
    if as_json:
        print(json.dumps(found.as_json(), indent=1, allow_nan=False))
    else:
        print(readable(found))
    if check and found.signs:
        raise typer.Exit(1)


def _task(name: str | None, data: Path | None) -> str | dict[str, Any] | None:
    """The task's name, or one that reads the rows given."""
    if data is None:
        return name
    if not is_there(data):
        raise UsageError("--data", f"no file or folder {str(data)!r}")
    return {"name": name or ("image-folder" if data.is_dir() else "text-table"), "path": str(data)}


def readable(found: Scan) -> str:
    """The report as text."""
    from mergesec.scanning.report import error_line

    lines = [f"Verdict: {VERDICTS[found.verdict]}", ""]
    for finding in found.findings:
        lines += _item("!" if finding.sign else "-", plain(finding.sentence))
        lines += _item(" ", plain(error_line(finding.errors)))
    if found.measured.blocks:
        lines += ["", *_blocks(found)]
    lines += ["", "What this scan could not tell:"]
    for text in found.could_not_tell:
        lines += _item("-", plain(text))
    if found.reference:
        made = found.reference
        lines += ["", f"Compared with {made['experts']} experts of {made['backbone']} (grid {made['grid']})."]
    return "\n".join(lines)


def _item(mark: str, text: str) -> list[str]:
    return textwrap.wrap(text, 88, initial_indent=f"{mark} ", subsequent_indent="  ") if text else []


def _blocks(found: Scan) -> list[str]:
    """A line per block."""
    heads = ("block", "change %", "aligned %", "condition", "rank %", "top %", "bf16 x")
    lines = ["  ".join(f"{h:>9}" for h in heads)]
    for i, b in enumerate(found.measured.blocks, 1):
        maps = [m for m in b.maps.values() if m.energy > 0]
        rank, top = (
            sum(getattr(m, n) for m in maps) / max(1, len(maps)) for n in ("effective_rank", "top_direction")
        )
        size = b.base**0.5 or 1.0
        row = (
            100 * b.plain**0.5 / size,
            100 * b.aligned**0.5 / size,
            b.condition,
            100 * rank,
            100 * top,
            b.rounding,
        )
        lines.append("  ".join([f"{i:>9}", *(f"{value:>9.3g}" for value in row)]))
    return lines
