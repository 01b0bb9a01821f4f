"""A tiny random CLIP with its tokenizer, saved as the real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from extras import needs


def make_clip(seed: int = 3, context: int = 77) -> Any:
    """Three blocks of width 32 at 32 pixels, patches of 8; embeddings of width 24, sentences of ``context`` tokens."""
    import transformers

    torch.manual_seed(seed)
    vision = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
        "intermediate_size": 64,
    }  # fmt: skip
    text = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
        "vocab_size": 514, "max_position_embeddings": context, "bos_token_id": 512, "eos_token_id": 513,
    }  # fmt: skip
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    ).eval()


def save_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer without merges: one token per byte, and per byte that ends a word."""
    from mergesec_tasks.mini_clip._words import save_words, vocabulary

    save_words(vocabulary([]), folder)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny CLIP."""
    needs("transformers")
    folder = tmp_path_factory.mktemp("clip")
    make_clip().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def short_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one that reads 32 tokens of a sentence."""
    needs("transformers")
    folder = tmp_path_factory.mktemp("short")
    make_clip(context=32).save_pretrained(folder)
    save_tokenizer(folder)
    return folder
