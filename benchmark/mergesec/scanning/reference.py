"""A reference table: experts whose history is known, measured like the one that is scanned. No torch.

What honest experts of a base look like, which thresholds follow from them, and how often these are wrong: a task's
experts are judged by thresholds that no expert of that task had a part in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from mergesec.errors import UsageError

SCHEMA = 1
MEASURES = 1
"""Version of what is measured: a table of another one is measured anew."""
HONEST, POISONED, PROTECTED = "honest", "poisoned", "protected"
FALSE_ALARMS = 0.05
"""Share of honest experts, among those that a threshold is chosen on, that may lie above it."""
SPREAD = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
FLOOR = 0.02
"""No spread of a feature (a logarithm or a share) is taken for smaller."""
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Specimen:
    """An expert whose history is known, in numbers."""

    kind: str
    """honest, poisoned or protected."""
    maker: str
    """The attack or protection, as boards show it; empty for an honest one."""
    task: str
    seed: int
    features: Mapping[str, float]
    protection: Mapping[str, float]
    data: Mapping[str, float] = field(default_factory=dict)
    """What tuning inputs told, where the table has that."""
    key: str = ""
    """Of its artifact in the store that it was measured from."""


@dataclass(frozen=True)
class Rate:
    """``k`` of ``n`` flagged, on ``tasks`` tasks; the interval counts a task as one draw, since its experts are
    alike."""

    k: int
    n: int
    tasks: int

    @property
    def value(self) -> float:
        return self.k / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval with as many draws as there are tasks."""
        n, p = max(1, self.tasks), self.value
        middle, half = p + Z95**2 / (2 * n), Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n))
        return max(0.0, (middle - half) / (1 + Z95**2 / n)), min(1.0, (middle + half) / (1 + Z95**2 / n))

    def __str__(self) -> str:
        low, high = (100 * end for end in self.interval)
        return f"{self.k} of {self.n} [{low:.0f}–{high:.0f} %]"


# --------------------------------------------------------------------------- tests of an expert


@dataclass(frozen=True)
class Spread:
    """Median and spread of one feature among honest experts."""

    middle: float
    scale: float
    low: float
    high: float


def spreads(honest: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Per feature that all of them have."""
    names = [n for n in honest[0] if all(n in h for h in honest)] if honest else []
    found = {}
    for name in names:
        values = [h[name] for h in honest]
        middle = median(values)
        scale = SPREAD * median([abs(v - middle) for v in values])
        found[name] = Spread(middle, max(scale, FLOOR), min(values), max(values))
    return found


def deviations(features: Mapping[str, float], among: Mapping[str, Spread]) -> dict[str, float]:
    """Robust z-scores."""
    return {n: (features[n] - s.middle) / s.scale for n, s in among.items() if n in features}


def unusual(features: Mapping[str, float], among: Mapping[str, Spread]) -> float:
    """The largest |z|."""
    return max((abs(z) for z in deviations(features, among).values()), default=0.0)


def threshold(scores: Iterable[float]) -> float:
    """The smallest value that at most ``FALSE_ALARMS`` of ``scores`` exceed."""
    ordered = sorted(scores)
    allowed = math.floor(FALSE_ALARMS * len(ordered))
    return ordered[len(ordered) - 1 - allowed] if ordered else math.inf


Score = Callable[[Specimen, Sequence[Specimen]], float]
"""(an expert, the honest ones it is compared with) -> the larger, the more suspicious."""


def unlike_honest(expert: Specimen, honest: Sequence[Specimen]) -> float:
    """The test of everything that was measured of the task vector."""
    return unusual(expert.features, spreads([h.features for h in honest]))


def re_alignable(expert: Specimen, honest: Sequence[Specimen]) -> float:
    """The test for a protection that keeps the function: how much nearer to the base it can be brought."""
    return expert.protection.get("orbit", 0.0)


def turnable(expert: Specimen, honest: Sequence[Specimen]) -> float:
    """The test on inputs: the largest share of them that a probe turned."""
    return expert.data["turned"]


TESTS: Mapping[str, Score] = {"protected": re_alignable, "unlike": unlike_honest, "trigger": turnable}
NEARER = math.log(1.1)
"""Whatever honest experts are like, re-alignment has to bring the blocks a tenth nearer before it tells of a
protection."""
LEAST = {"protected": NEARER}
"""What a threshold is at least."""


# --------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class Reference:
    """Specimens of one base, and how the table was made."""

    backbone: str
    base: str
    """Digest of the base's tensors: a table speaks of no other base."""
    made: Mapping[str, Any]
    """Grid, version, code and the command."""
    specimens: tuple[Specimen, ...]

    @cached_property
    def honest(self) -> tuple[Specimen, ...]:
        return tuple(s for s in self.specimens if s.kind == HONEST)

    @cached_property
    def limits(self) -> dict[str, float]:
        """Thresholds from all honest experts: each is scored without its own task's others."""
        return {name: self._limit(name, self._fit(name)) for name in TESTS if self._fit(name)}

    def _fit(self, test: str) -> list[Specimen]:
        """The honest experts that a test can be tried on."""
        return [h for h in self.honest if test != "trigger" or h.data]

    @staticmethod
    def _limit(test: str, honest: Sequence[Specimen]) -> float:
        score = TESTS[test]
        found = threshold(score(h, [o for o in honest if o.task != h.task]) for h in honest)
        return max(found, LEAST.get(test, -math.inf))

    @cached_property
    def rates(self) -> dict[str, dict[tuple[str, str], Rate]]:
        """By test, then (kind, maker): how many are flagged, each by a threshold that no expert of its task,
        honest or not, had a part in."""
        return {name: self._rates(name) for name in self.limits}

    def judged(self, test: str) -> list[tuple[Specimen, bool]]:
        """Every expert that a test can be tried on, and whether it is flagged."""
        found = []
        for task in sorted({s.task for s in self.specimens}):
            rest = [h for h in self._fit(test) if h.task != task]
            limit = self._limit(test, rest)
            own = [s for s in self.specimens if s.task == task and (test != "trigger" or s.data)]
            found += [(s, TESTS[test](s, rest) > limit) for s in own]
        return found

    def _rates(self, test: str) -> dict[tuple[str, str], Rate]:
        flagged: dict[tuple[str, str], list[tuple[str, bool]]] = {}
        for s, hit in self.judged(test):
            flagged.setdefault((s.kind, s.maker), []).append((s.task, hit))
        return {
            who: Rate(sum(hit for _, hit in rows), len(rows), len({t for t, _ in rows}))
            for who, rows in sorted(flagged.items())
        }

    def as_json(self) -> dict[str, Any]:
        """The file's content; numbers to six digits."""
        return {
            "schema": SCHEMA, "measures": MEASURES, "backbone": self.backbone, "base": self.base, "made": dict(self.made),
            "specimens": [_rounded(asdict(s)) for s in self.specimens],
        }  # fmt: skip


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read_reference(path: Path) -> Reference:
    """A table from its file; UsageError if it is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if (raw["schema"], raw["measures"]) != (SCHEMA, MEASURES):
            raise ValueError("another version's; bench scan --calibrate makes it anew")
        specimens = tuple(Specimen(**s) for s in raw["specimens"])
        numbers = [v for s in specimens for part in (s.features, s.protection, s.data) for v in part.values()]
        if not all(type(v) in (int, float) and math.isfinite(v) for v in numbers):
            raise ValueError("a measure is not a finite number")
        return Reference(str(raw["backbone"]), str(raw["base"]), dict(raw["made"]), specimens)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError("--reference", f"{path} is not a reference table ({error})") from None


def shipped() -> list[Path]:
    """The tables that come with the package."""
    folder = Path(str(files("mergesec.scanning"))) / "references"
    return sorted(folder.glob("*.json"))


def reference_of(base: str) -> Reference | None:
    """The shipped table that speaks of a base with this digest."""
    return next((found for path in shipped() if (found := read_reference(path)).base == base), None)
