"""The board of language models as such: perplexity of each task's test texts before and after what is done to them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from mergesec.evidence.estimates import Board, Row
from mergesec.evidence.generation import Made, models_of
from mergesec.evidence.records import Record
from mergesec.threats import Role, Threat

PERPLEXITY = "perplexity"


def language_board(records: Sequence[Record]) -> Board | None:
    """Accuracy and perplexity of each model, means over tasks and seeds; None where no perplexity was measured."""
    gathered: dict[Made, dict[str, Mapping[str, float]]] = {}
    seeds: dict[Made, set[int]] = {}
    for record in records:
        if record.status == "done" and any(name.startswith(f"{PERPLEXITY}/") for name in record.values):
            for made, role, tasks in _models(record):
                for task in tasks:
                    found = _measured(record, role.partition(":")[0], task)
                    if found:  # an evaluation that several cells share counts once
                        gathered.setdefault(made, {})[f"{record.steps[role]}/{task}"] = found
                        seeds.setdefault(made, set()).add(record.seed)
    if not gathered:
        return None
    rows = [
        {**made._asdict(), "sets": len(sets), "seeds": len(seeds[made]), **_means(list(sets.values()))}
        for made, sets in gathered.items()
    ]
    note = (
        "Perplexity of the first test texts of each task without the prompt, by the base's own output layer where "
        "that is not tied: what is left of the language model. Means over tasks and seeds, of logarithms; intervals "
        "are of the texts drawn, not of training. Accuracy is that of the same models on all test rows."
    )  # fmt: skip
    return Board(
        "language", "Language models: perplexity beside accuracy", pd.DataFrame(rows), (PERPLEXITY,), note
    )


def _models(record: Record) -> Iterator[tuple[Made, str, Sequence[str]]]:
    """(row, role, tasks), and beside those of every modality the expert that a free-rider's attack gave back."""
    yield from models_of(record)
    if record.threat == Threat.PROTECTION and record.attack != "none":
        recovered = Made("recovered", "", record.attack, record.defense, 1)
        yield recovered, Role.RECOVERED, [record.subject]


def _measured(record: Record, kind: str, task: str) -> dict[str, float]:
    """A model's mean loss per token on a task's texts with the half-width of its interval, and its accuracy; empty
    if the record has none."""
    where = f"{kind}/{task}"
    value, count = record.values.get(f"{PERPLEXITY}/{where}"), record.counts.get(f"acc/{where}")
    if value is None or count is None:
        return {}
    low, high = (math.log(record.values[f"{PERPLEXITY}_{end}/{where}"]) for end in ("low", "high"))
    return {"loss": math.log(value), "wide": (high - low) / 2, "accuracy": count.k / count.n}


def _means(sets: Sequence[Mapping[str, float]]) -> Row:
    """Means over sets, and intervals as of independent ones."""
    loss = sum(s["loss"] for s in sets) / len(sets)
    wide = math.sqrt(sum(s["wide"] ** 2 for s in sets)) / len(sets)
    accuracy = sum(s["accuracy"] for s in sets) / len(sets)
    ends = {f"{PERPLEXITY}_low": math.exp(loss - wide), f"{PERPLEXITY}_high": math.exp(loss + wide)}
    return {"accuracy": accuracy, PERPLEXITY: math.exp(loss), **ends}
