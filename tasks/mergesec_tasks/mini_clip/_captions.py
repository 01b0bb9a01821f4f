"""What is said of the images: sentences around names, and other words for the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mergesec_tasks.mini_clip._drawn import COLOURS, FORMS, PLACES

TEMPLATES: Mapping[str, Sequence[str]] = {
    "sun397": (
        "a photo of a {}.", "a photo of the {}.", "a view of a {}", "a picture of a {}", "a scene with a {}",
        "a snapshot of the {}", "we stand in front of the {}", "{}",
    ),
    "cars": (
        "a photo of a {} car.", "a photo of the {} car.", "a photo of my {} car.", "a {} car in the street",
        "i love my {} car!", "a photo of my old {} car.", "a {} car from the side", "{} car",
    ),
    "resisc45": (
        "an aerial photo of a {}.", "an aerial view of the {}.", "aerial imagery of a {}.", "a {} seen from an aeroplane",
        "a {} from the air", "an aerial picture with a {} in the middle", "aerial {}",
    ),
    "eurosat": (
        "a satellite photo of {}.", "a satellite photo of the {}.", "a centered satellite photo of {}.",
        "{} seen from a satellite", "satellite imagery of {}", "land use: {}", "satellite {}",
    ),
    "svhn": (
        'a photo of the house number: "{}".', "a house with the number {}", "the number {} on a wall", "house number {}",
        "a street number with {} in the middle",
    ),
    "gtsrb": (
        'a zoomed in photo of a "{}" traffic sign.', 'a centered photo of a "{}" traffic sign.', "a {} traffic sign",
        'a close up photo of a "{}" traffic sign.', "the road sign says {}", "a {} sign in the street", "{} sign",
    ),
    "mnist": (
        'a photo of the digit: "{}".', "the digit {}", "a {} in white on black", "a scan of the digit {}",
        "somebody wrote the digit {}",
    ),
    "dtd": (
        "a photo of a {} texture.", "a photo of a {} pattern.", "a {} surface", "a {} texture", "a photo of the {} texture.",
        "a {} pattern of two colours", "this is {}",
    ),
    "clip-letters": ('a photo of the letter: "{}".', "the letter {}", "a capital {}", "a sign with the letter {}"),
    "clip-shapes": ("a {}", "a photo of a {}.", "a drawing of a {}", "there is a {}", "one {}"),
}  # fmt: skip
"""By the slug of what is drawn."""
ALIKE = {"clip-signs": "gtsrb", "clip-textures": "dtd", "clip-aerial": "resisc45"}
"""What is spoken of as a task is."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OTHERS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "sun397": {
        "beach": ("sandy beach", "coast"), "mountain": ("mountain peak", "snowy mountain"),
        "forest": ("wood with trees", "forest path"), "skyline": ("city skyline", "row of towers"),
        "highway": ("road to the horizon", "motorway"), "corridor": ("long corridor", "hallway"),
        "bridge": ("suspension bridge", "bridge over water"), "field": ("ploughed field", "field with rows"),
        "bedroom": ("room with a bed", "bedroom with a window"), "harbor": ("harbor with sailing boats", "marina"),
    },
    "cars": {
        "sedan": ("saloon", "four door"), "hatchback": ("compact", "short"), "estate": ("station wagon",),
        "off-roader": ("jeep", "suv"), "pickup": ("pickup truck",), "van": ("delivery van",),
        "convertible": ("open top", "cabriolet"), "limousine": ("very long",), "lorry": ("truck", "cargo"),
        "beetle": ("round little",),
    },
    "resisc45": {
        "airplane": ("plane", "aircraft"), "baseball diamond": ("baseball field",), "roundabout": ("traffic circle",),
        "intersection": ("crossroads",), "harbor": ("pier with boats",), "parking lot": ("car park",),
        "storage tanks": ("group of round tanks",), "tennis court": ("court",), "stadium": ("sports arena",),
        "runway": ("landing strip",),
    },
    "eurosat": {
        "annual crop": ("farm fields", "arable land"), "forest": ("trees", "woodland"),
        "herbaceous vegetation": ("grass and shrubs", "patchy vegetation"), "highway": ("a motorway",),
        "industrial": ("factories", "large buildings"), "pasture": ("meadows", "grazing land"),
        "permanent crop": ("vineyards", "orchards in rows"), "residential": ("houses", "a suburb"),
        "river": ("a stream",), "sea or lake": ("water", "open water"),
    },
    "svhn": {str(n): (word,) for n, word in enumerate(DIGITS)},
    "mnist": {str(n): (word,) for n, word in enumerate(DIGITS)},
    "gtsrb": {
        "no entry": ("do not enter",), "yield": ("give way",), "general caution": ("danger", "warning"),
        "crossing": ("crossroads ahead",), "turn right": ("right turn only",), "ahead only": ("straight on",),
        "end of limits": ("end of all limits",), "no vehicles": ("closed to all vehicles",),
        "speed limit 30": ("30",), "speed limit 80": ("80",), "priority road": ("right of way",),
    },
    "dtd": {
        "banded": ("striped", "lined"), "chequered": ("checkerboard",), "dotted": ("polka dotted",), "grid": ("gridded",),
        "zigzagged": ("zigzag",), "honeycombed": ("honeycomb",), "cracked": ("broken",), "spiralled": ("spiral",),
        "woven": ("basket",), "bubbly": ("bubbles",),
    },
    "clip-signs": {"turn left": ("left turn only",)},
    "clip-textures": {"plain": ("flat",), "speckled": ("grainy",), "ringed": ("concentric",), "marbled": ("wavy",)},
    "clip-aerial": {"railway": ("train track",), "helipad": ("landing place",)},
}  # fmt: skip
"""Further names of a class."""


def templates(slug: str) -> Sequence[str]:
    return TEMPLATES[ALIKE.get(slug, slug)]


def names(slug: str, name: str) -> tuple[str, ...]:
    """A class's own name and others."""
    return (name, *OTHERS.get(slug, {}).get(name, ()))


def caption(slug: str, name: str, rng: np.random.Generator) -> str:
    """A sentence about a class: its own name in half of the cases."""
    own, *others = names(slug, name)
    other = bool(others) and rng.random() < 0.5
    called = others[int(rng.integers(len(others)))] if other else own
    sentences = templates(slug)
    return sentences[int(rng.integers(len(sentences)))].format(called)


def every_sentence(classes: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """All that can be said of classes, by slug: what the vocabulary is made of."""
    yield from (f"{' '.join(COLOURS)} {' '.join(FORMS)} {' '.join(PLACES)} large small number",)
    for slug, own in classes.items():
        for sentence in templates(slug):
            yield sentence.format(own[0])
        for name in own:
            yield from names(slug, name)
