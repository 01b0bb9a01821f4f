"""A table of texts of one's own: parquet, CSV or JSON lines in a folder that the grid file names."""

from __future__ import annotations

from typing import Any

from mergesec.contracts import ContractError, DataContext, Split
from mergesec_tasks.text.emotion import FolderText

CARD: dict[str, Any] = {
    "extends": "emotion",
    "name": "text-table",
    "class": "TextTable",
    "title": "A table of texts of your own",
    "paper": "",
    "url": "",
    "summary": "train and test as parquet, CSV or JSON lines beside classes.json, at path; no code",
    "classes": 0,
    "labels": [],
    "source": "the folder at path",
    "licence": "yours",
    "local": False,
    "images": {},
    "parameters": {"path": {"type": "path", "default": None, "doc": "the folder; it counts by content"}},
}


class TextTable(FolderText):
    """A folder named in the grid file instead of one under the data root."""

    def __init__(self, path: str | None, **parameters: Any) -> None:
        super().__init__(**parameters)
        self.path = path

    def load(self, ctx: DataContext) -> dict[str, Split]:
        """As of a folder under the data root; ContractError without a path."""
        if self.path is None:
            raise ContractError(f"{self.name}: needs a path, {{name: {self.name}, path: FOLDER}}")
        return super().load(DataContext(ctx.device, ctx.seed, self.path))
