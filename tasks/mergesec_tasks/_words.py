"""How a folder's texts become tokens: tokenizer.json and its like, read and compared. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mergesec.errors import UsageError
from mergesec.files import brief, is_file
from mergesec.modelfiles import CONFIG, LONGEST, read_json, shown

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
OLD = ("vocab.json", "merges.txt")
SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
FEWEST = 0.75
"""Share of a network's vocabulary that its tokenizer has at least: some vocabularies are padded, none by as much."""
_STAGES = ("normalizer", "pre_tokenizer", "post_processor")
_SETTINGS = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "do_lower_case", "strip_accents", "tokenize_chinese_chars",
    "bos_token", "eos_token", "unk_token", "cls_token", "sep_token",
)  # fmt: skip
"""Of tokenizer_config.json: what decides the tokens of a text. Padding is masked, and decides nothing."""


def check_words(folder: Path, size: int, who: str) -> dict[str, int]:
    """The words of a folder's tokenizer.json with their numbers; UsageError, naming file and field, unless all of them
    have numbers of their own below ``size``, the network's vocabulary."""
    path = folder / TOKENIZER
    raw = read_json(path, who)
    words = _vocabulary(raw, path, who)
    _check_numbers(words, size, path, who)
    unknown = _unknown(raw)
    if unknown and unknown not in words:
        raise UsageError(who, f"{brief(str(path))!r}: model.unk_token {shown(unknown)} is none of its words")
    _check_ends(raw.get("post_processor"), words, path, who)
    if _there(folder / SETTINGS):
        _check_room(words, read_json(folder / SETTINGS, who), size, folder / SETTINGS, who)
    return words


def check_old_words(folder: Path, size: int, who: str) -> dict[str, int]:
    """As ``check_words``, of a folder with the older vocab.json and merges.txt. Without them the library would make a
    tokenizer that knows no word."""
    if not (is_file(folder / OLD[0]) and is_file(folder / OLD[1])):
        raise UsageError(who, f"no {TOKENIZER}, nor {OLD[0]} and {OLD[1]}, in {brief(str(folder))!r}")
    path, words = next(_older(folder, who))
    _check_numbers(words, size, path, who)
    return words


def check_many_words(folder: Path, words: Mapping[str, int], size: int, who: str) -> None:
    """UsageError for a tokenizer with far fewer words than the network: it was made for a smaller one."""
    if len(words) < FEWEST * size:
        raise UsageError(
            who, f"{brief(str(folder / TOKENIZER))!r} has {len(words)} words, config.json has a vocab_size of {size}: the "
            "tokenizer is another network's",
        )  # fmt: skip


def _check_numbers(words: Mapping[str, int], size: int, path: Path, who: str) -> None:
    by_number: dict[int, str] = {}
    for word, number in words.items():
        if number >= size:
            raise UsageError(
                who, f"{brief(str(path))!r}: the token {shown(word)} has the number {number}, config.json has a "
                f"vocab_size of {size}",
            )  # fmt: skip
        if number in by_number:
            raise UsageError(
                who, f"{brief(str(path))!r}: the tokens {shown(by_number[number])} and {shown(word)} have the same number "
                f"{number}",
            )  # fmt: skip
        by_number[number] = word


def _check_ends(processor: Any, words: Mapping[str, int], path: Path, who: str) -> None:
    """UsageError unless what is put around every text are words of the vocabulary under their own numbers."""
    for word, number in _put_around(processor):
        if words.get(word) != number:
            raise UsageError(
                who, f"{brief(str(path))!r}: post_processor puts {shown(word)} with the number {shown(number)} around "
                f"texts, in the vocabulary it is {shown(words.get(word))}",
            )  # fmt: skip


def _put_around(processor: Any) -> Iterator[tuple[str, Any]]:
    """Words and the numbers they are put around texts with, by a file that nobody has checked yet."""
    told = processor if isinstance(processor, dict) else {}
    for part in _listed(told, "processors"):
        yield from _put_around(part)
    pairs = [told.get(name) for name in ("sep", "cls")]
    special = told.get("special_tokens")
    for one in special.values() if isinstance(special, dict) else ():
        pairs += zip(_listed(one, "tokens"), _listed(one, "ids"), strict=False)
    yield from ((str(p[0]), p[1]) for p in pairs if isinstance(p, (list, tuple)) and len(p) == 2)


def _listed(told: Any, name: str) -> list[Any]:
    found = told.get(name) if isinstance(told, dict) else None
    return found if isinstance(found, list) else []


def _check_room(words: Mapping[str, int], told: Mapping[str, Any], size: int, path: Path, who: str) -> None:
    """UsageError for special tokens that the library would add behind a vocabulary that is full."""
    named = [(name, value) for name, value in told.items() if name.endswith("_token")]
    listed = told.get("added_tokens_decoder")
    named += [("added_tokens_decoder", v) for v in listed.values()] if isinstance(listed, dict) else []
    for name, value in named:
        word = _content(value)
        if name in SPECIAL and not (value is None or isinstance(word, str)):
            raise UsageError(who, f"{brief(str(path))!r}: {name} is {shown(value)}; expected a word, or null")
        if isinstance(word, str) and word not in words and len(words) >= size:
            raise UsageError(
                who, f"{brief(str(path))!r}: {name} gives the token {shown(word)} the number {len(words)}, config.json has a "
                f"vocab_size of {size}; the tokenizer has no such word",
            )  # fmt: skip


def read_tokenizer(folder: Path, who: str) -> Any:
    """The tokenizer of a folder's tokenizer.json, which cuts and fills up nothing; UsageError if the library cannot
    read it."""
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # whatever the library calls it
        raise UsageError(
            who, f"{brief(str(folder / TOKENIZER))!r} cannot be read ({brief(str(error))})"
        ) from None
    found.no_truncation()  # both may be set in the file, and are set anew when texts are read
    found.no_padding()
    return found


def encoded(words: Any, text: str, who: str) -> Any:
    """The tokens of a text, without special ones; UsageError if the tokenizer has none for a part of it."""
    try:
        return words.encode(text, add_special_tokens=False)
    except Exception as error:  # whatever the library calls it
        raise UsageError(
            who, f"the folder's tokenizer takes no text {brief(text)!r} ({brief(str(error))})"
        ) from None


def unknown_word(folder: Path, who: str) -> str:
    """What a tokenizer puts where it has no word; empty if it says nothing."""
    return _unknown(read_json(folder / TOKENIZER, who))


def _unknown(raw: Mapping[str, Any]) -> str:
    model = raw.get("model")
    told = model if isinstance(model, dict) else {}
    number, vocab = told.get("unk_id"), told.get("vocab")
    if isinstance(vocab, list):  # of pieces with scores, checked before
        return str(vocab[number][0]) if type(number) is int and 0 <= number < len(vocab) else ""
    return str(told.get("unk_token") or "")


def tokens_around(folder: Path, who: str) -> int:
    """How many tokens a folder's tokenizer.json puts around every text."""
    return _count_around(read_json(folder / TOKENIZER, who).get("post_processor"))


def check_between(longest: int, around: int, who: str) -> None:
    """UsageError unless ``longest`` tokens leave room for one of the text: all texts would be the same."""
    if longest <= around:
        raise UsageError(
            f"{who}.max_length", f"{longest} leaves no room for a text between the {around} tokens around it"
        )


def _count_around(processor: Any) -> int:
    if isinstance(processor, dict) and processor.get("type") in ("BertProcessing", "RobertaProcessing"):
        return 2
    single, parts = (_listed(processor, name) for name in ("single", "processors"))
    return sum(isinstance(part, dict) and "SpecialToken" in part for part in single) + sum(
        map(_count_around, parts)
    )


def check_beginning(folder: Path, who: str) -> None:
    """UsageError if tokenizer_config.json begins texts with a word that has another number than config.json's
    ``bos_token_id``: a tokenizer of another network, however many words it has."""
    if not _there(folder / SETTINGS):
        return
    word = _content(read_json(folder / SETTINGS, who).get("bos_token"))
    wanted = read_json(folder / CONFIG, who).get("bos_token_id")
    number = _vocabulary(read_json(folder / TOKENIZER, who), folder / TOKENIZER, who).get(str(word))
    if word is not None and number is not None and type(wanted) is int and number != wanted:
        raise UsageError(
            who, f"{brief(str(folder / SETTINGS))!r}: bos_token {shown(word)} has the number {number}, config.json has a "
            f"bos_token_id of {wanted}: the tokenizer is not this network's",
        )  # fmt: skip


def _vocabulary(raw: Mapping[str, Any], path: Path, who: str) -> dict[str, int]:
    """Words to numbers, added ones included."""
    model = raw.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # of pieces with scores
        pieces = [piece[0] if isinstance(piece, list) and piece else None for piece in vocab]
        vocab = {piece: number for number, piece in enumerate(pieces)}
    if not isinstance(vocab, dict) or not vocab or not all(map(_entry, vocab.items())):
        raise UsageError(who, f"{brief(str(path))!r}: model.vocab {shown(vocab)} is not words with numbers")
    added = raw.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(a, dict) and _entry((a.get("content"), a.get("id"))) for a in added
    ):
        raise UsageError(who, f"{brief(str(path))!r}: added_tokens {shown(added)} is not a list of tokens")
    return {**vocab, **{a["content"]: a["id"] for a in added}}


def _entry(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and type(item[1]) is int and item[1] >= 0


def check_same_words(base: Path, folder: Path, who: str) -> None:
    """UsageError if an expert's folder makes other tokens of a text than the base's, as far as it says."""
    if _there(folder / TOKENIZER):
        _check_same_tokenizer(base / TOKENIZER, folder / TOKENIZER, who)
    else:
        for path, words in _older(folder, who):
            _check_listed(base / TOKENIZER, words, path, who)
    if _there(folder / SETTINGS) and _there(base / SETTINGS):
        ours, theirs = read_json(base / SETTINGS, who), read_json(folder / SETTINGS, who)
        for name in _SETTINGS:
            own, other = _content(ours.get(name)), _content(theirs.get(name))
            if own is not None and other is not None and own != other:
                _differs(who, folder / SETTINGS, name, other, own)


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _content(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _differs(who: str, path: Path, what: str, other: Any, own: Any) -> None:
    raise UsageError(
        who, f"{brief(str(path))!r}: {what} is {shown(other)}, for the base it is {shown(own)}: the expert was made for "
        "other tokens",
    )  # fmt: skip


def _check_same_tokenizer(base: Path, other: Path, who: str) -> None:
    ours, theirs = read_json(base, who), read_json(other, who)
    if ours == theirs:
        return
    _check_same_numbers(_vocabulary(ours, base, who), _vocabulary(theirs, other, who), other, who)
    for name, own, found in _stages(ours, theirs):
        if own != found:
            _differs(who, other, name, found, own)


def _check_same_numbers(ours: Mapping[str, int], theirs: Mapping[str, int], path: Path, who: str) -> None:
    for word in {**theirs, **ours}:
        if ours.get(word) != theirs.get(word):
            _differs(who, path, f"the number of {shown(word)}", theirs.get(word), ours.get(word))


def _stages(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What a text goes through, in both: name, the base's, the other's."""
    yield from ((name, ours.get(name), theirs.get(name)) for name in _STAGES)
    own, other = _model(ours["model"]), _model(theirs["model"])
    yield from ((f"model.{n}", own.get(n), other.get(n)) for n in {**own, **other})


def _model(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A model without its words; merges of pairs as all releases of tokenizers mean them."""
    found = {n: v for n, v in raw.items() if n != "vocab" and v is not None and v is not False}
    merges = found.get("merges")
    if isinstance(merges, list):
        found["merges"] = [m.split(" ") if isinstance(m, str) else m for m in merges]
    return found


def _older(folder: Path, who: str) -> Iterator[tuple[Path, dict[str, int]]]:
    """Words in the files of slow tokenizers."""
    if _there(folder / OLD[0]):
        path = folder / OLD[0]
        words = read_json(path, who)
        if not all(map(_entry, words.items())):
            raise UsageError(who, f"{brief(str(path))!r} is not words with numbers")
        yield path, words
    if _there(folder / "vocab.txt"):
        path = folder / "vocab.txt"
        try:
            if not is_file(path) or path.stat().st_size > LONGEST:
                raise ValueError(f"not a file of at most {LONGEST >> 20} MiB")
            lines = path.read_text(encoding="utf-8").split("\n")
        except (ValueError, OSError) as error:
            raise UsageError(who, f"{brief(str(path))!r} is no list of words ({brief(str(error))})") from None
        yield path, {word.rstrip("\r"): number for number, word in enumerate(lines) if word.strip()}


def _check_listed(base: Path, words: Mapping[str, int], path: Path, who: str) -> None:
    """UsageError unless the base has these words under the same numbers, and no others but added ones."""
    raw = read_json(base, who)
    ours = _vocabulary(raw, base, who)
    added = {a["content"] for a in raw.get("added_tokens") or []}
    _check_same_numbers({w: n for w, n in ours.items() if w in words or w not in added}, words, path, who)
