"""Looks at a YAML file before anything composes it: encoding, size, depth, and what its aliases expand to."""

from __future__ import annotations

from pathlib import Path

from mergesec.errors import UsageError

MOST_BYTES = 1 << 20
MOST_NODES = 100_000
"""Values in a file, aliases counted as often as they are used: a file of nine lines can ask for billions."""
DEEPEST = 40


def check_yaml(path: Path, where: str) -> None:
    """UsageError unless the file is UTF-8 text of a bounded YAML mapping. Its values are not built."""
    try:
        size = path.stat().st_size
        text = path.read_bytes().decode("utf-8") if size <= MOST_BYTES else ""
    except OSError as error:
        raise UsageError(where, f"cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UsageError(where, f"not UTF-8 text (byte {error.start})") from None
    if size > MOST_BYTES:
        raise UsageError(where, f"{size} bytes; a grid has at most {MOST_BYTES}")
    _check_events(text, where)


def _check_events(text: str, where: str) -> None:
    """Walks the parser's events, which are as many as the file has tokens, whatever they expand to."""
    import yaml

    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    total, mapping = 0, False
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, start = open_nodes.pop()
                if anchor:
                    sizes[anchor] = total - start
                continue
            if not isinstance(event, yaml.NodeEvent):
                continue
            if not total:
                mapping = isinstance(event, yaml.MappingStartEvent)
            if isinstance(event, yaml.AliasEvent):
                if event.anchor not in sizes:
                    raise UsageError(where, f"alias *{event.anchor} of what is not complete before it")
                total += sizes[event.anchor]
            else:
                total += 1
            if isinstance(event, yaml.ScalarEvent) and event.anchor:
                sizes[event.anchor] = 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, total - 1))
            if len(open_nodes) > DEEPEST:
                raise UsageError(where, f"nested more than {DEEPEST} levels deep")
            if total > MOST_NODES:
                raise UsageError(where, f"more than {MOST_NODES} values (aliases counted as often as used)")
    except yaml.YAMLError as error:
        raise UsageError(where, f"not YAML: {' '.join(str(error).split())}"[:400]) from None
    if not mapping:
        raise UsageError(where, "not a mapping of fields")
