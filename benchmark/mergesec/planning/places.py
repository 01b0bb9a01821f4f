"""Where a grid's paths start: those in a file at the file's folder, those on the command line where one stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergesec.files import is_there
from mergesec.planning.cards import Parameter
from mergesec.planning.catalog import Catalog
from mergesec.planning.gridspec import GridSpec, Named
from mergesec.planning.presets import preset_names
from mergesec.planning.refs import HUB_NAME, PACKAGED

Spot = tuple[str, ...]
"""Keys and positions that lead to a value of the grid."""


def placed(spec: GridSpec, source: str, overrides: Sequence[str], catalog: Catalog) -> GridSpec:
    """The grid with its file's relative paths made absolute. Keys stay the same: they hold content, not places."""
    if source in preset_names():
        return spec
    spots = tuple(spot for spot in map(_overridden, overrides) if spot)
    places = _Places(Path(source).resolve().parent, spots, catalog)
    suite, axes = spec.suite, spec.axes
    return spec.model_copy(
        update={
            "suite": suite.model_copy(
                update={
                    "backbone": places.component(suite.backbone, "backbone", ("suite", "backbone")),
                    "tasks": places.components(suite.tasks, "task", ("suite", "tasks")),
                    "experts": {
                        task: places.file(source, ("suite", "experts", task), hub=True)
                        for task, source in suite.experts.items()
                    },
                }
            ),
            "axes": axes.model_copy(
                update={
                    "merging": places.components(axes.merging, "merging", ("axes", "merging")),
                    "attacks": places.components(axes.attacks, "attack", ("axes", "attacks")),
                    "defenses": places.components(axes.defenses, "defense", ("axes", "defenses")),
                }
            ),
        }
    )


def _overridden(override: str) -> Spot:
    """What of the grid an override sets; nothing if it picks a suite's file."""
    key = override.partition("=")[0]
    return () if key == "suite" else tuple(key.lstrip("+").split("."))


@dataclass(frozen=True)
class _Places:
    home: Path
    given: tuple[Spot, ...]
    """Set on the command line."""
    catalog: Catalog

    def components(self, items: Sequence[Named], kind: str, spot: Spot) -> tuple[Named, ...]:
        return tuple(self.component(item, kind, (*spot, str(i))) for i, item in enumerate(items))

    def component(self, item: Named, kind: str, spot: Spot) -> Named:
        """A component's parameters; what is wrong with it is told when it is resolved."""
        if isinstance(item, str):
            return item
        entry = self.catalog.entries[kind].get(str(item.get("name")))
        known = entry.card.parameters if entry is not None else {}
        return {k: self._value(known.get(k), v, (*spot, str(k))) for k, v in item.items()}

    def _value(self, parameter: Parameter | None, value: Any, spot: Spot) -> Any:
        """A path, or what names components with parameters of their own; several where a list is an axis."""
        kind = parameter.type if parameter is not None else ""
        if isinstance(value, list) and kind in ("path", "model", "merging", "attacks"):
            return [self._value(parameter, one, (*spot, str(i))) for i, one in enumerate(value)]
        if isinstance(value, str) and kind in ("path", "model"):
            return self.file(value, spot, hub=kind == "model")
        if isinstance(value, dict) and kind in ("merging", "attacks"):
            return self.component(value, kind.removesuffix("s"), spot)
        return value

    def file(self, value: str, spot: Spot, hub: bool) -> str:
        """The absolute path; ``hub``: a name of the hub, or of what a package carries, may stand there instead, where
        no file is."""
        ours = any(spot[: len(given)] == given for given in self.given)
        if ours or not value or value.startswith("~") or Path(value).is_absolute():
            return value
        place = self.home / value
        named = hub and re.fullmatch(f"{HUB_NAME}|{PACKAGED}", value) and not is_there(place)
        return value if named else str(place)
