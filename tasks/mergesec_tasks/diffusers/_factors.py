"""LoRA of a denoiser as diffusers saves it (``pytorch_lora_weights.safetensors``), added to the base's weights.

W + (α / r) B A for every map, convolutions too (B is one over single pixels). α is the file's: a tensor ``.alpha``
beside the factors, or ``lora_alpha`` in its metadata; without either it is r. Names are those of peft
(``lora_A``, ``lora_B``) or the older ones (``lora.down``, ``lora.up``), under ``unet.`` or ``transformer.``.
"""

from __future__ import annotations

from pathlib import Path

from mergesec.contracts import Weights
from mergesec_tasks.diffusers._factornames import alphas, places


def with_factors(base: Weights, file: Path, part: str, who: str) -> Weights:
    """``base`` with the factors of ``file`` added, float32. UsageError, naming file and tensor, for what does not
    belong to it."""
    from safetensors import safe_open

    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    told, weights = alphas(file, part, who), dict(base)
    adapted = places(file, shapes, part, who)
    with safe_open(file, framework="pt") as opened:
        for module, sides in adapted.items():
            first, second = (opened.get_tensor(sides[side]).float() for side in "AB")
            rank = float(len(first))
            alpha = told.get(module, told.get("", rank))
            if "alpha" in sides:
                alpha = float(opened.get_tensor(sides["alpha"]))
            name = f"{module}.weight"
            update = (second.flatten(1) @ first.flatten(1)).view(shapes[name])
            weights[name] = base[name] + (alpha / rank) * update
    return weights
