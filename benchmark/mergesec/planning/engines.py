"""Where a grid's steps run: ``engine:`` of a grid file and the options of ``bench run``. Never part of a key, a record
or a result."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from mergesec.errors import UsageError, nearest

ENGINES = ("local", "ray", "slurm")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class EngineSpec(BaseModel):
    """An engine and what it is told. See docs/scaling.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "local"
    workers: int | None = Field(default=None, ge=1)
    """Ray: steps at once; Slurm: jobs at once."""
    address: str | None = None
    """Ray: a cluster that runs; without one a cluster is started on this machine."""
    cpus: float | None = Field(default=None, gt=0)
    gpus: float | None = Field(default=None, ge=0)
    memory: float | None = Field(default=None, gt=0)
    """GB. These three: Ray for each step, Slurm for each worker."""
    time_limit: str | None = None
    """Slurm: how long a worker's job lasts, as 90s, 30m, 4h or 2d."""
    slurm: dict[str, str | int | float | bool] = Field(default_factory=dict)
    """Slurm: options of sbatch by submitit's names (partition, account, qos, constraint, ...)."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ENGINES:
            raise ValueError(f"no engine {name!r}{nearest(name, ENGINES)}")
        return name

    @field_validator("time_limit")
    @classmethod
    def _long_enough(cls, text: str | None) -> str | None:
        if text is not None and not seconds_of(text) > 0:
            raise ValueError(f"{text!r} is no time; write 90s, 30m, 4h or 2d")
        return text


_OWN = {
    "workers": ("ray", "slurm"), "cpus": ("ray", "slurm"), "gpus": ("ray", "slurm"), "memory": ("ray", "slurm"),
    "address": ("ray",), "time_limit": ("slurm",), "slurm": ("slurm",),
}  # fmt: skip
"""Which engines have an option."""


def seconds_of(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``4h`` or ``2d``; 0 for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    return seconds if math.isfinite(seconds) else 0.0


def as_fields(value: Any) -> Any:
    """``engine: ray`` is short for ``engine: {name: ray}``."""
    return {"name": value} if isinstance(value, str) else value


def engine_spec(grid: EngineSpec | None, given: Mapping[str, Any]) -> EngineSpec:
    """A grid's engine with what was given on the command line instead; UsageError names an option that does not
    fit. Another engine than the grid's begins anew."""
    told = {key: value for key, value in given.items() if value not in (None, {}, [])}
    before = grid.model_dump(exclude_defaults=True) if grid is not None else {}
    if "name" in told and grid is not None and told["name"] != grid.name:
        before = {}
    try:
        spec = EngineSpec.model_validate({**before, **told})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0])
        raise UsageError(_option(field), _message(field, first)) from None
    for field, engines in _OWN.items():
        if spec.name not in engines and getattr(spec, field) not in (None, {}):
            raise UsageError(
                _option(field), f"is for --engine {' and '.join(engines)}, and this is {spec.name}"
            )
    return spec


def _option(field: str) -> str:
    return "--engine" if field == "name" else f"--{field.replace('_', '-')}"


def _message(field: str, error: Any) -> str:
    said = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"unknown field{nearest(field, EngineSpec.model_fields)}"
    return said if error["type"] == "value_error" else f"{said}, got {error['input']!r}"
