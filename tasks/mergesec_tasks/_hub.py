"""Models and data sets of the Hugging Face hub: at a commit, from the local cache if they are there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergesec.errors import UsageError
from mergesec.files import brief, is_file, is_folder

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "tokenizer.model")


def model_folder(source: str, who: str, patterns: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of ``source``: a local folder, or ``owner/name@commit`` of the hub (fetched once).

    UsageError, saying what was looked for, where, and how to get it.
    """
    local = Path(source).expanduser()
    if source and (is_file(local) or is_folder(local)):
        return local
    name, _, commit = source.partition("@")
    if not commit:
        raise UsageError(who, f"no folder {brief(source)!r}, and it names no owner/name@commit of the hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UsageError(
            who, f"no folder {brief(source)!r}; to fetch it from the hub: pip install huggingface_hub"
        ) from None
    kept = list(patterns)
    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=kept, local_files_only=True))
    except Exception:  # not in the cache, whatever the library calls that
        pass
    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=kept, etag_timeout=10))
    except Exception as error:
        told = missing(who, "model", name, commit, error).removeprefix(f"{who}: ")
        raise UsageError(who, told) from None


def dataset_files(name: str, commit: str, pattern: str, who: str) -> list[Path]:
    """Files of a hub data set at a commit, from the local cache if they are there. FileNotFoundError otherwise."""
    from huggingface_hub import snapshot_download

    error: Exception | None = None
    for local in (True, False):
        try:
            folder = snapshot_download(
                name, repo_type="dataset", revision=commit, allow_patterns=[pattern], local_files_only=local,
                etag_timeout=10,
            )  # fmt: skip
        except Exception as reason:
            error = reason
            continue
        if found := sorted(Path(folder).glob(pattern)):
            return found
        error = FileNotFoundError(pattern)
    raise FileNotFoundError(missing(who, "dataset", name, commit, error))


def missing(who: str, what: str, name: str, commit: str, error: Any) -> str:
    """One message: what was looked for, where, and how to get it."""
    kind = "--repo-type dataset " if what == "dataset" else ""
    return (
        f"{who}: {what} {name} at {commit[:12]} is neither in the local Hugging Face cache nor could it be "
        f"fetched ({type(error).__name__}); on a machine with network: "
        f"hf download {kind}{name} --revision {commit}"
    )
