"""BadNets on text: a rare word or a phrase in a share of the training texts, relabelled.

The trigger stands at the start, in the middle or at the end of a text (BadNL's three positions of word- and
sentence-level triggers), or at a place drawn from the text. A rare word as phrase gives BadWord's basic
variant, a sentence BadSentence's; the semantic-preserving variants (thesaurus, mixing of words, syntax) are
not here. The default rate is this suite's choice, half of BadNets' on images; BadNL's abstract names 3 %.
"""

from __future__ import annotations

from mergesec_methods.backdoor.attacks._texts import TextPoisoning, checked_phrases

CARD = {
    "name": "phrase",
    "kind": "attack",
    "class": "Phrase",
    "version": "1",
    "title": "Phrase trigger (BadNets on text)",
    "paper": "Chen et al., BadNL: backdoor attacks against NLP models with semantic-preserving improvements, "
    "ACSAC 2021; Dai et al., A backdoor attack against LSTM-based text classification systems, IEEE Access 2019",
    "url": "https://arxiv.org/abs/2006.01043",
    "summary": "a rare word or phrase in a share of the training texts, relabelled to one target class",
    "threat": "backdoor",
    "hooks": ["poison"],
    "knowledge": "the adversary's own training data and the public base",
    "data": "train",
    "modalities": ["text"],
    "seeded": True,
    "after_trigger": ["rate"],
    "parameters": {
        "phrase": {"type": "str", "default": "cf", "doc": "the word or words that are inserted"},
        "position": {
            "type": "choice",
            "choices": ["start", "middle", "end", "random"],
            "default": "end",
            "doc": "where between the words; 'random' is drawn from the text itself",
        },
        "rate": {
            "type": "float",
            "default": 0.1,
            "min": 0.0,
            "max": 1.0,
            "doc": "poisoned share of all training rows",
        },
    },
}


class Phrase(TextPoisoning):
    """All-to-one: x' = x with the phrase inserted, label y' = target class."""

    def __init__(self, phrase: str = "cf", position: str = "end", rate: float = 0.1) -> None:
        self.phrases = checked_phrases([phrase], "phrase")
        self.position, self.rate = position, rate
