"""What prompt and label tokens of a causal model must fit: the context, and one token for a class. No torch.

``bench plan`` looks with this before anything runs, the backbone again with its own tokeniser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergesec.errors import UsageError
from mergesec.files import brief
from mergesec.modelfiles import stored_tensors
from mergesec_tasks._configs import Values, layers_of, positions_of, width_of
from mergesec_tasks._modelfolders import KINDS, check_base
from mergesec_tasks._words import check_beginning, encoded, read_tokenizer, unknown_word

SLOT = "{text}"
WHOLE, FIRST = "whole", "first"
OUTPUT = "lm_head.weight"


def check_template(template: str, who: str) -> None:
    """UsageError unless the template has one place for the text."""
    if template.count(SLOT) != 1:
        raise UsageError(who, f"needs {SLOT} once, got {brief(repr(template))}")


def check_room(prompt: int, longest: int, positions: int, who: str) -> None:
    """UsageError unless the model has the positions, and the prompt's tokens leave room for one of the text."""
    if longest > positions:
        raise UsageError(
            f"{who}.max_length", f"{longest} exceeds the {positions} positions of the model's context"
        )
    if prompt >= longest:
        raise UsageError(
            f"{who}.template", f"its {prompt} tokens leave no room for a text in max_length {longest}"
        )


def check_answers(longest: int, most: int, who: str) -> None:
    """UsageError unless the longest prompt and its answer fit: they are not cut."""
    if longest > most:
        raise UsageError(who, f"{most} is less than the {longest} tokens of a prompt and its answer")


def check_labels(
    tokens: Mapping[str, Sequence[str]], prefix: str, labels: str, who: str, unknown: str = ""
) -> None:
    """UsageError unless the tokens of the classes' names tell them apart: one token each, or with ``labels: first``
    different first ones; none of them ``unknown``, what stands for what the tokenizer does not know."""
    first: dict[str, str] = {}
    for name, found in tokens.items():
        shown = " ".join(repr(token) for token in found)
        if not found:
            raise UsageError(who, f"the class name {name!r} has no token")
        if labels == WHOLE and len(found) > 1:
            raise UsageError(
                who, f"the class name {name!r} is split into {len(found)} tokens ({brief(shown)}) after label_prefix "
                f"{prefix!r}; set another label_prefix, or labels to 'first' for its first token",
            )  # fmt: skip
        if found[0] in first:
            raise UsageError(
                who,
                f"{first[found[0]]!r} and {name!r} begin with the same token ({found[0]!r}); set label_prefix",
            )
        if found[0] == unknown:
            raise UsageError(
                who,
                f"the tokenizer does not know the class name {name!r} after label_prefix {prefix!r} ({unknown!r})",
            )
        first[found[0]] = name


def inspect(parameters: Mapping[str, Any], where: str, classes: Mapping[str, Sequence[str]]) -> None:
    """UsageError, naming the grid's field, for layers, lengths, prompts and names of classes (of tasks whose cards
    tell them) that the backbone would refuse later. What lies on the hub is looked at when it has been fetched."""
    check_template(parameters["template"], f"{where}.template")
    folder = Path(str(parameters["path"])).expanduser()
    if not parameters["path"] or not folder.exists():
        return
    values = check_base(folder, f"{where}.path", KINDS["hf-causal"])
    check_beginning(folder, f"{where}.path")
    check_output(folder, values, f"{where}.path")
    own = layers_of(values)
    if parameters["layers"] > own:
        raise UsageError(f"{where}.layers", f"{parameters['layers']} exceed the {own} of the model")
    words = read_tokenizer(folder, f"{where}.path")
    positions = positions_of(values)
    parts = parameters["template"].split(SLOT)
    prompt = sum(len(encoded(words, part, f"{where}.path").ids) for part in parts)
    check_room(_begins(words) + prompt, parameters["max_length"] or positions, positions, where)
    prefix, unknown = parameters["label_prefix"], unknown_word(folder, f"{where}.path")
    for task, names in classes.items():
        numbers = {n: encoded(words, prefix + n, f"{where}.path").ids for n in names}
        tokens = {n: [words.id_to_token(number) for number in found] for n, found in numbers.items()}
        check_labels(tokens, prefix, parameters["labels"], f"{where}.label_prefix ({task})", unknown)


def check_output(folder: Path, values: Values, who: str) -> None:
    """UsageError unless there is an output layer, from which tokens are read: the embeddings where they are tied."""
    if values["tie_word_embeddings"]:
        return
    stored = stored_tensors(folder, who)
    if OUTPUT not in stored:
        raise UsageError(who, f"'{folder}' has no {OUTPUT}, and its embeddings are not tied")
    wanted = (values["vocab_size"], width_of(values))
    if stored[OUTPUT].shape != wanted:
        raise UsageError(
            who, f"'{OUTPUT}' in '{stored[OUTPUT].file}' has the shape {list(stored[OUTPUT].shape)}, by config.json it "
            f"would be {list(wanted)}",
        )  # fmt: skip


def inspect_answers(
    parameters: Mapping[str, Any], where: str, rows: Mapping[str, Sequence[tuple[str, str]]]
) -> None:
    """UsageError, naming the grid's field, for tasks with a row (prompt, answer) that is longer than ``max_length``."""
    folder = Path(str(parameters["path"])).expanduser()
    if not parameters["path"] or not folder.exists():
        return
    values = check_base(folder, f"{where}.path", KINDS["hf-causal"])
    words = read_tokenizer(folder, f"{where}.path")
    most = parameters["max_length"] or positions_of(values)
    begins = _begins(words)
    for task, written in rows.items():
        lengths = (
            len(encoded(words, prompt, f"{where}.path").ids)
            + len(encoded(words, answer, f"{where}.path").ids)
            for prompt, answer in written
        )
        check_answers(begins + max(lengths, default=0), most, f"{where}.max_length ({task})")


def _begins(words: Any) -> int:
    """How many tokens stand before every text."""
    return len(words.encode("").ids[:1])
