"""What a check of an entry found, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Verdict = Literal["pass", "REFUSED", "note", "skip"]


class Finding(NamedTuple):
    """One line of the report. A ``note`` refuses nothing, and is for the person who reads it."""

    check: str
    verdict: Verdict
    why: str = ""


class Difference(NamedTuple):
    """How a re-run differs from what was submitted: mean rates over the cells, and the 95 % interval of the
    difference, paired by test sample."""

    what: str
    cells: int
    submitted: float
    again: float
    low: float
    high: float


@dataclass
class Report:
    """Everything that was found. ``rerun`` names the cells that were run again."""

    findings: list[Finding] = field(default_factory=list)
    rerun: tuple[str, ...] = ()
    cells: int = 0
    differences: tuple[Difference, ...] = ()

    @property
    def refused(self) -> bool:
        return any(f.verdict == "REFUSED" for f in self.findings)

    @property
    def verified(self) -> bool:
        """Whether cells were run again, and none of it refused."""
        return bool(self.rerun) and not self.refused

    def told(self, check: str, wrong: list[str]) -> bool:
        """Add a check: passed if nothing is wrong, else refused with each reason; whether it passed."""
        self.findings += [Finding(check, "REFUSED", why) for why in wrong] or [Finding(check, "pass")]
        return not wrong
