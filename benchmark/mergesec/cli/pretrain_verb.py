"""``bench pretrain NAME``: make a shipped backbone's weights again."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer


def main(
    name: Annotated[
        str, typer.Argument(help="a backbone whose card names a pretraining script")
    ] = "mini/vit",
    out: Annotated[Path, typer.Option(help="folder for the weights and the model card")] = Path("pretrained"),
    seed: Annotated[int, typer.Option(help="seed of the data and of training")] = 0,
    threads: Annotated[int, typer.Option(help="threads; the weights depend on it in the last digits")] = 1,
) -> None:
    from mergesec.errors import UsageError
    from mergesec.files import check_writable
    from mergesec.planning.catalog import load_catalog

    card = load_catalog().get("backbone", name, "name").card
    if not card.pretrain:
        raise UsageError("name", f"{name} has no pretraining script; its weights come from {card.source}")
    check_writable(out, "--out")
    import torch

    torch.set_num_threads(threads)
    module, _, function = card.pretrain.partition(":")
    pretrain = getattr(importlib.import_module(module), function)
    facts = pretrain(
        out, seed, card=out / f"{name.replace('/', '-')}.md",
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    for key, value in facts.items():
        print(f"{key}: {value}")
    print(out)
