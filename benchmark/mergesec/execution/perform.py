"""Does a step where it belongs: here, or in a guest if a plugin's code takes part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mergesec.execution.guests.handing import MEASURES
from mergesec.execution.guests.host import Hosts
from mergesec.execution.logs import Log
from mergesec.execution.steps import run
from mergesec.execution.store import Laid
from mergesec.execution.work import Bench, Work, packed
from mergesec.planning.plan import Step


class Performed(NamedTuple):
    """What is to be stored of a step. ``guest_mb``: peak memory of the guests, MiB; 0 without any."""

    blob: Laid
    facts: dict[str, Any]
    guest_mb: float = 0.0


def perform(step: Step, bench: Bench, kinds: Mapping[str, str], log: Log) -> Performed:
    """Do a step. Where plugins' code took part, the facts say whose, and whether it was contained.

    What measures runs here, and asks guests for no more than a plugin's own network or trigger; all other steps
    with a plugin in them run in a guest as a whole.
    """
    hosts = bench.guests
    if not step.plugins or not isinstance(hosts, Hosts):
        return Performed(*run(step, bench, kinds))
    hosts.log, hosts.peak_mb = log, 0.0
    work = Work(step, bench, kinds)
    if measured_here(work):
        blob, facts = run(step, bench, kinds)
    else:
        result = hosts.run(work)
        blob, facts = packed(result.tensors), dict(result.facts)
    told = {"plugins": sorted(step.plugins), "contained": hosts.contained}
    return Performed(blob, {**facts, **told}, hosts.peak_mb)


def measured_here(work: Work) -> bool:
    """Whether a step with a plugin in it is this process's own: it measures, and neither data nor features are
    the plugin's."""
    if any(ref.plugins and ref.kind in ("task", "backbone") for ref in work.refs.values()):
        return False
    if work.step.kind in MEASURES:
        return True
    if work.step.kind != "verify" or work.refs["defense"].plugins:
        return False
    with work.guests.network(
        work
    ) as served:  # a mark is looked for in the network itself, not in its features
        return served is None
