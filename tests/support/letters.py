"""A tiny random language model that reads and writes single characters, and a whole grid run on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from extras import needs

from mergesec.evidence.records import Record
from mergesec.execution.harvest import make_records
from mergesec.execution.scheduler import Outcome
from mergesec.execution.steps import run
from mergesec.execution.store import Store
from mergesec.execution.work import Bench
from mergesec.planning.catalog import load_catalog
from mergesec.planning.gridspec import parse_grid
from mergesec.planning.plan import make_plan
from mergesec.planning.resolve import resolve
from mergesec_tasks.text.hf_causal import HfCausal

transformers = needs("transformers")
tokenizers = needs("tokenizers")

CPU = torch.device("cpu")


def letters_model(place: Path, wholes: Sequence[str] = ()) -> Path:
    """The folder of a Llama of two blocks; ``wholes`` are texts that it reads as one token each."""
    letters = ["[PAD]", "<s>", "\n", *(chr(i) for i in range(32, 127)), *wholes]
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(letters)}, unk_token="[PAD]")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex("|".join([*wholes, r"[\s\S]"])), "isolated"
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(place)
    torch.manual_seed(4)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=len(letters), max_position_embeddings=160, pad_token_id=0, bos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    return place


def causal(folder: Path, **given: Any) -> HfCausal:
    """The model as a backbone whose prompt is the text alone."""
    return HfCausal(**{"path": str(folder), "layers": 0, "max_length": 128, "template": "{text}", "label_prefix": " ", **given})  # fmt: skip


def records_of(grid: dict[str, Any], place: Path) -> list[Record]:
    """All steps of a grid, run here one after the other with a store at ``place``."""
    catalog = load_catalog()
    plan = make_plan(resolve(parse_grid(grid, grid["name"]), catalog), lambda task: "")
    bench, kinds = Bench(Store(place), catalog, CPU), {k: s.kind for k, s in plan.steps.items()}
    for key, step in plan.steps.items():
        blob, info = run(step, bench, kinds)
        bench.store.put(step.kind, key, blob, {**info, "seconds": 0.0, "peak_mb": 0.0, "device": "cpu"})
    return make_records(plan, bench.store, Outcome())
