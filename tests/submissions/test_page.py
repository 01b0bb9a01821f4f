"""The page, the forms and the workflow tell of what is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergesec.cli.app import _verb
from mergesec.cli.submit_verb import ACTIONS
from mergesec.evidence.external import MEASURES, External
from mergesec.submissions.entry import FILE, Claim, Code, Paper, Submission, read_entry

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "submitting.md").read_text(encoding="utf-8")
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_page_tells_of_every_field() -> None:
    known = {name for model in (Submission, Code, Claim) for name in model.model_fields}
    known |= {f"{name}" for name in Paper.model_fields}
    assert not [name for name in known if f"`{name}`" not in PAGE]
    assert not [name for name in (*External.model_fields, *MEASURES.values()) if name not in PAGE]


def test_the_page_names_actions_and_options_that_there_are() -> None:
    options = {
        name for parameter in _verb("submit").params for name in (*parameter.opts, *parameter.secondary_opts)
    }
    workflow = (ROOT / ".github" / "workflows" / "submissions.yml").read_text(encoding="utf-8")
    for text in (PAGE, workflow):
        assert set(re.findall(r"bench submit ([a-z]+)", text)) <= set(ACTIONS)
        lines = [line for line in text.splitlines() if "bench submit" in line or "`--" in line]
        assert {found for line in lines for found in re.findall(r"(?<![\w-])--[a-z-]+", line)} <= options


def test_the_example_of_an_external_number_is_one() -> None:
    block = re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    assert [External.model_validate(one).by for one in yaml.safe_load(block[1])] == ["Doe et al., 2027"]


@pytest.mark.parametrize("path", FORMS, ids=lambda p: p.stem)
def test_a_form_asks_each_thing_once(path: Path) -> None:
    form: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(set(ids)) == len(ids) > 3
    assert all(part["attributes"].get("label") for part in form["body"] if "id" in part)


def test_the_workflow_runs_strangers_code_without_rights() -> None:
    path = ROOT / ".github" / "workflows" / "submissions.yml"
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    assert set(workflow[True]) == {"pull_request"}  # YAML reads `on` as true
    text = path.read_text(encoding="utf-8")
    assert "{{ secrets" not in text and text.count("persist-credentials: false") == 2


def test_shipped_entries_are_ready_to_be_run() -> None:
    for folder in sorted((ROOT / "examples" / "entries").glob(f"*/{FILE}")):
        entry = read_entry(folder.parent)
        assert entry.submission.method == folder.parent.name
        assert entry.submission.claims
