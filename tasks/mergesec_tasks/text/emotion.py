"""Text classification from local folders: ``<root>/<task>/{train,test}.parquet`` + ``classes.json``.

Instead of parquet: shards of it, CSV or JSON lines. Columns: ``text`` (strings) and an integer label column. Nothing is downloaded and no data ships with the
project.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergesec.contracts import DataContext, Split
from mergesec.text import TextTask
from mergesec_tasks._folder import (
    FolderSplits,
    bare,
    capped,
    split_tuning,
)
from mergesec_tasks._tables import read_table, text_cells

CARD: dict[str, Any] = {
    "name": "emotion",
    "kind": "task",
    "class": "FolderText",
    "version": "1",
    "title": "Emotion (CARER)",
    "paper": "Saravia et al., CARER: contextualized affect representations for emotion recognition, EMNLP 2018",
    "url": "https://github.com/dair-ai/emotion_dataset",
    "summary": "English tweets in six emotions; dair-ai/emotion, configuration split",
    "modality": "text",
    "classes": 6,
    "labels": ["sadness", "joy", "love", "anger", "fear", "surprise"],
    "source": "local folder; the official copy is dair-ai/emotion on the Hugging Face hub",
    "licence": "educational and research purposes only",
    "local": True,
    "images": {"train": 16000, "test": 2000},
    "parameters": {
        "max_train": {"type": "int", "default": 0, "min": 0, "doc": "training rows kept; 0 = all"},
        "max_test": {"type": "int", "default": 0, "min": 0, "doc": "test rows kept; 0 = all"},
        "text_column": {"type": "str", "default": "text", "doc": "column of texts"},
        "label_column": {"type": "str", "default": "label", "doc": "column of integer labels"},
    },
}


class FolderText(FolderSplits, TextTask):
    """One text task read from its own folder. ``partial`` tells a subset of the official set after ``load``."""

    layout = "expected <data root>/<task>/train.parquet, test.parquet (or .csv, .jsonl) and classes.json"
    page = "docs/methods/text.md"
    kinds = ("parquet", "csv", "jsonl")

    def __init__(self, max_train: int, max_test: int, text_column: str, label_column: str) -> None:
        self.max_train, self.max_test = max_train, max_test
        self.text_column, self.label_column = text_column, label_column
        self.classes: list[str] = []
        self.partial: str = ""

    # ---- reading

    def _read_rows(self, files: list[Path]) -> Split:
        """Texts and labels int64 ``[N]`` of a split's files; only the two columns needed are read."""
        table = read_table(files, text_cells(self.text_column), self.label_column, len(self.classes))
        return Split(table.cells, table.targets)

    def load(self, ctx: DataContext) -> dict[str, Split]:
        """Splits of strings. Tuning is cut from train before ``max_train`` applies.

        FileNotFoundError if a file is missing; ContractError for a wrong column, label or text.
        """
        files = self._tables(ctx.folder)
        self.classes = self._class_names(ctx.folder, "classes", self.label_column, files)
        self._check_present(ctx.folder, files)
        rows, test = self._read_rows(files["train"]), self._read_rows(files["test"])
        self.partial = self._missing(rows, test)
        train, tuning = split_tuning(rows.targets)
        return {
            "train": rows.take(train[capped(rows.targets[train], self.max_train)]),
            "tuning": rows.take(tuning),
            "test": test.take(capped(test.targets, self.max_test)),
        }

    def _missing(self, train: Split, test: Split) -> str:
        """What the folder lacks: rows of a class, and what the official set of the card has; "" if nothing."""
        lacking = bare(self.classes, {"train": train.targets, "test": test.targets})
        if self.name != CARD["name"]:
            return ", ".join(lacking)
        if len(self.classes) < CARD["classes"]:
            lacking.append(f"{len(self.classes)} of {CARD['classes']} classes")
        texts, total = len(train) + len(test), sum(CARD["images"].values())
        if texts < total:
            lacking.append(f"{texts} of {total} texts")
        return ", ".join(lacking)
