"""``bench info NAME``: one card."""

from __future__ import annotations

from typing import Annotated

import typer

from mergesec.cli import show
from mergesec.cli.complete import component_names
from mergesec.cli.options import Plugins


def main(
    name: Annotated[str, typer.Argument(help="a registered name", autocompletion=component_names)],
    plugin: Plugins = None,
) -> None:
    from mergesec.errors import UsageError, nearest
    from mergesec.planning.catalog import load_catalog

    catalog = load_catalog(plugin or ())
    found = [e for e in catalog if e.card.name == name]
    if not found:
        for kind, absent in catalog.absent:
            if absent == name:
                catalog.get(kind, name, "name")  # says what to install
        raise UsageError("name", f"unknown {name!r}{nearest(name, [e.card.name for e in catalog])}")
    for entry in found:
        card = entry.card
        facts = {
            "kind": card.kind, "title": card.title, "summary": card.summary, "paper": card.paper, "url": card.url,
            "threat model": card.threat, "hooks": ", ".join(card.hooks), "knowledge": card.knowledge,
            "data": card.data if card.kind in ("merging", "attack", "defense") else "",
            "modality": card.modality or ", ".join(card.modalities), "classes": card.classes or "",
            "images": ", ".join(f"{k} {v}" for k, v in card.images.items()), "source": card.source,
            "licence": card.licence, "recipe": ", ".join(f"{k}={v}" for k, v in card.recipe.items()),
            "hub": f"{card.hub['name']}@{card.hub['revision']}" if card.hub else "",
            "prompts": " | ".join(card.templates), "asks for": "; ".join(card.holds), "version": card.version, "from": entry.origin,
        }  # fmt: skip
        print(card.name)
        for key, value in facts.items():
            if value:
                print(f"  {key:<13} {value}")
        if card.parameters:
            rows = []
            for n, p in card.parameters.items():
                allowed = ", ".join(p.choices) or (
                    p.interval if p.min is not None or p.max is not None else ""
                )
                allowed += f" or {', '.join(map(str, p.also))}" if p.also else ""
                default = str(p.default).lower() if isinstance(p.default, bool) else str(p.default)
                rows.append([n, p.type, default, allowed, p.doc])
            print()
            show.table("", ["parameter", "type", "default", "allowed", "meaning"], rows)
