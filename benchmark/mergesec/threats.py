"""The two threat models: who attacks what, with which hooks, and what a cell is measured by. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import StrEnum
from typing import Literal


class Threat(StrEnum):
    """What a cell is about. The two threat models never share a board."""

    CLEAN = "clean"
    PROTECTION = "protection"
    BACKDOOR = "backdoor"


Secrets = Literal["own", "shared"]
"""Whether each protected expert has a secret of its own, or all share one."""

Company = Literal["next", "drawn"]
"""Who stands beside a cell's subject (experts merged with it, accomplices, further protected experts): those after it
in suite order, or drawn by the subject and the seed, so that "how many" is not "which tasks"."""


class Hook(StrEnum):
    """Where a component acts."""

    TRIGGER = "trigger"
    """Alone: a trigger for models that are what they are; every expert in the merge is a clean one."""
    POISON = "poison"
    FORGE = "forge"
    RECOVER = "recover"
    EXAMINE = "examine"
    """Of a screen: what it finds in one expert by itself, whoever stands beside it."""
    SCREEN = "screen"
    MERGE = "merge"
    REPAIR = "repair"
    TRAIN = "train"
    PROTECT = "protect"
    VERIFY = "verify"


HOOKS: dict[tuple[str, str], tuple[Hook, ...]] = {
    ("attack", Threat.BACKDOOR): (Hook.TRIGGER, Hook.POISON, Hook.FORGE),
    ("attack", Threat.PROTECTION): (Hook.RECOVER,),
    ("defense", Threat.BACKDOOR): (Hook.EXAMINE, Hook.SCREEN, Hook.MERGE, Hook.REPAIR),
    ("defense", Threat.PROTECTION): (Hook.TRAIN, Hook.PROTECT, Hook.VERIFY),
}
"""The hooks of each kind of component under each threat model."""


class Role(StrEnum):
    """What an evaluation of a cell measures; ``expert:TASK``, ``poisoned:TASK`` and ``verify:SUSPECT`` name whom,
    ``ROLE+trigger`` is the same under the trigger."""

    BASE = "base"
    EXPERT = "expert"
    CLEAN_MERGE = "clean_merge"
    """The merge without attack and defense."""
    MERGE = "merge"
    """The cell's own merge, after attack and defense."""
    DEFENDED_CLEAN_MERGE = "defended_clean_merge"
    """What the cell's defense makes of clean experts (of those that its screen kept in the cell): the control of
    a backdoor under a defense, and what the defense costs where there is no attack."""
    PUBLISHED = "published"
    PUBLISHED_BF16 = "published_bf16"
    RECOVERED = "recovered"
    PROTECTED_MERGE = "protected_merge"
    """The merge of protected experts before the free-rider's attack."""
    POISONED = "poisoned"
    LOGITS = "logits"
    """Comparison of the published expert with the owner's."""
    GAP = "gap"
    """Comparison of the recovered expert with the owner's."""
    VISIBILITY = "visibility"
    VERIFY = "verify"

    def of(self, whom: str) -> str:
        """``role:whom``."""
        return f"{self}:{whom}"

    @property
    def triggered(self) -> str:
        """The same under the trigger."""
        return f"{self}{TRIGGERED}"


TRIGGERED = "+trigger"


def in_company(names: Sequence[str], subject: str, company: Company, seed: int) -> tuple[str, ...]:
    """The subject, then the others: in suite order around it, or in an order drawn by the subject and the seed, in
    which who comes before whom does not depend on who else is there."""
    place = list(names).index(subject)
    others = [names[(place + i) % len(names)] for i in range(1, len(names))]
    if company == "drawn":
        others.sort(key=lambda name: hashlib.sha256(f"company\n{subject}\n{seed}\n{name}".encode()).digest())
    return (subject, *others)


def accomplices(
    experts: Sequence[str], subject: str, target_task: str, company: Company = "next", seed: int = 0
) -> tuple[str, ...]:
    """Tasks whose contributors can be malicious together, the subject first. The task aimed at off-task is a victim
    and never among them."""
    return tuple(t for t in in_company(experts, subject, company, seed) if t != target_task)
