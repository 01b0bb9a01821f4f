"""Subjects to teach a generator from a few photographs and a prompt (Ruiz et al., CVPR 2023), judged by alignment.

``<data root>/<task>/`` holds the photographs. Training pairs each with the prompt (``a photo of sks dog``); test rows
ask for the subject in two scenes, each with noise seeds of its own. As in the PaRaMS paper what counts is the
alignment score: the cosine of the image and the text that was asked for, by a CLIP (``judge``). A row is right where
the text that was asked for is nearer to its image than those of the other scenes and of a few that describe no picture
of anything. CLIP knows no made-up names: its texts have the class in place of the subject.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mergesec.contracts import Context, ContractError, DataContext, Measured, Model, Split, Weights
from mergesec.generation import (
    SHOWN,
    GenerationTask,
    Noised,
    Request,
    Rows,
    first_of_each,
)
from mergesec.judging import LEAST_ACCURACY
from mergesec_tasks._hub import model_folder
from mergesec_tasks._transformers import clip_tokenizer, complaining, quiet
from mergesec_tasks.diffusers._backbone import codes, library
from mergesec_tasks.diffusers._prompts import LETTERS, check_prompts
from mergesec_tasks.vision.folder import decode

CARDS: list[dict[str, Any]] = [
    {
        "name": "dreambooth/one",
        "kind": "task",
        "class": "Subject",
        "version": "1",
        "title": "A subject (DreamBooth)",
        "paper": "Ruiz et al., DreamBooth, CVPR 2023",
        "url": "https://arxiv.org/abs/2208.12242",
        "summary": "a subject from a few photographs in a folder; alignment of what is generated with two prompts",
        "modality": "generation",
        "classes": 2,
        "source": "local folder of photographs",
        "licence": "that of the photographs",
        "local": True,
        "inspect": "mergesec_tasks.diffusers._prompts:inspect",
        "parameters": {
            "subject": {"type": "str", "default": "sks dog", "doc": "what prompts call the subject: a rare word and its class"},
            "class_name": {"type": "str", "default": "dog", "doc": "the subject's class, a word of its name"},
            "prompt": {"type": "str", "default": "a photo of {}", "doc": "training prompt, {} is the subject"},
            "first": {"type": "str", "default": "a photo of {} on a beach", "doc": "first test prompt"},
            "second": {"type": "str", "default": "a photo of {} in the snow", "doc": "second test prompt"},
            "judge": {"type": "model", "default": "openai/clip-vit-base-patch32@c237dc49a33fc61debc9276459120b7eac67e7ef", "doc": "a CLIP: folder, or owner/name@commit of the hub"},
            "size": {"type": "int", "default": 512, "min": 8, "max": 2048, "doc": "side of the images, pixels"},
            "rows": {"type": "int", "default": 32, "min": 1, "max": 10000, "doc": "test images of each prompt"},
        },
    },
    {"extends": "dreambooth/one", "name": "dreambooth/two", "title": "Another subject (DreamBooth)"},
]  # fmt: skip

NOTHING = ("random noise", "a blurry abstract texture", "a blank image", "a corrupted image")
"""Texts that are nearest to images of nothing."""
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
BATCH = 16
SPREAD = 1.96


class Subject(GenerationTask):
    """The task of the card above."""

    def __init__(
        self,
        subject: str,
        class_name: str,
        prompt: str,
        first: str,
        second: str,
        judge: str,
        size: int,
        rows: int,
    ) -> None:
        check_prompts(
            {
                "subject": subject,
                "class_name": class_name,
                "prompt": prompt,
                "first": first,
                "second": second,
            },
            "dreambooth",
        )
        self.subject, self.class_name, self.prompt = subject, class_name, prompt
        self.scenes, self.judge, self.size, self.count = (first, second), judge, size, rows
        self.classes = [scene.replace("{}", class_name) for scene in self.scenes]
        self._clip: Any = None

    # ---- data

    def load(self, ctx: DataContext) -> dict[str, Split]:
        """Photographs with the training prompt, and rows that ask for the scenes."""
        images = self._photographs(ctx.folder)
        first = torch.zeros(len(images), dtype=torch.int64)
        trained = self._rows(images, [self.prompt] * len(images), first, "train")
        return {
            "train": trained,
            "tuning": self._asked(images, "tuning"),
            "test": self._asked(images, "test"),
        }

    def _photographs(self, folder: str | None) -> Tensor:
        home = Path(folder) if folder is not None else None
        if home is None or not home.is_dir():
            raise FileNotFoundError(
                f"task '{self.name}': no folder {folder!r} with photographs; set --data-root or MERGESEC_DATA"
            )
        files = sorted(f for f in home.iterdir() if f.suffix.lower() in ENDINGS)
        if not files:
            raise ContractError(f"task '{self.name}': {str(home)!r} holds no image ({', '.join(ENDINGS)})")
        stored = [file.read_bytes() for file in files]
        return decode(stored, range(len(files)), self.size, lambda row: f"{files[row]}", "crop")

    def _asked(self, images: Tensor, pool: str) -> Split:
        targets = torch.arange(self.count * len(self.scenes)) % len(self.scenes)
        prompts = [self.scenes[int(target)] for target in targets]
        return self._rows(images[torch.arange(len(targets)) % len(images)], prompts, targets, pool)

    def _rows(self, images: Tensor, prompts: Sequence[str], targets: Tensor, pool: str) -> Split:
        texts = [prompt.replace("{}", self.subject) for prompt in prompts]
        seeds = zlib.crc32(f"{self.name}/{pool}".encode()) * 100_000 + torch.arange(len(targets))
        return Split(Rows(images, codes(texts, LETTERS), seeds), targets)

    def noised(self, batch: Split, generator: torch.Generator) -> Split:
        """Fresh noise and uniform times; no prompt is dropped, as there are too few images to forget it."""
        request: Request = batch.inputs
        place, count = request.noise.device, len(request)
        noise = torch.randn(request.noise.shape, generator=generator)
        times = torch.rand(count, generator=generator)
        kept = torch.zeros(count, dtype=torch.bool, device=place)
        return batch.with_inputs(
            Noised(request.conditions, noise.to(place), request.images, times.to(place), kept)
        )

    # ---- judging

    def fit_head(self, model: Model, split: Split, ctx: Context) -> Weights:
        """The judge's texts as directions ``[K, d]``: the scenes, what is nothing, and the class by itself last."""
        texts = [*self.classes, *NOTHING, self.prompt.replace("{}", self.class_name)]
        return {"texts": self._judge(ctx.device).texts(texts)}

    def _judge(self, device: torch.device) -> Clip:
        if self._clip is None:
            self._clip = Clip(model_folder(self.judge, "judge"), device)
        found: Clip = self._clip
        return found

    def outputs(self, model: Model, head: Weights, inputs: Any) -> Tensor:
        """Of a request: cosines with the scenes and with nothing ``[N, K]``. Of a noised batch: what training makes
        small ``[N, 1, d]``."""
        if isinstance(inputs, Noised):
            return model.features(inputs)[:, None]
        return self._cosines(self.served(model, head, inputs).clamp(0, 1), head)[:, :-1]

    def _cosines(self, images: Tensor, head: Weights) -> Tensor:
        """``[N, K]``; the last text is the class by itself."""
        cosines: Tensor = self._judge(images.device).images(images) @ head["texts"].to(images.device).T
        return cosines

    def measure(
        self, model: Model, head: Weights, splits: Mapping[str, Split], device: torch.device,
        change: Callable[[Any], Any] | None = None, aim: Tensor | None = None,
    ) -> Measured:  # fmt: skip
        """Which text CLIP finds nearest, and the alignment score, over all rows and by prompt."""
        test = splits["test"]
        with torch.inference_mode():
            real = splits["train"].inputs.images.to(device).float() / 255
            self._check_clip(self._cosines(real, head))
            images = self._generated(model, head, test, device, change)
            cosines = torch.cat([self._cosines(part, head) for part in torch.split(images, BATCH)]).cpu()
            own = self._judge(device).images(real).mean(0)
            alike = torch.cat(
                [self._judge(device).images(part) @ own for part in torch.split(images, BATCH)]
            ).cpu()
        aligned = cosines[torch.arange(len(test)), test.targets]
        values = {"alignment": _mean(aligned), "likeness": _mean(alike)}
        for i, which in enumerate(("first", "second")):
            values[f"alignment_{which}"] = _mean(aligned[test.targets == i])
        shown = first_of_each(test.targets, SHOWN)
        pictures = {"images": (images[shown.to(device)] * 255).round().to(torch.uint8).cpu(), "rows": shown}
        return Measured(self.predictions(cosines[:, :-1]), values, pictures)

    def _check_clip(self, cosines: Tensor) -> None:
        """ContractError if the judge does not find the class in the real photographs."""
        classes = len(self.classes)
        nothing = cosines[:, classes : classes + len(NOTHING)].amax(1)
        known = float((cosines[:, -1] > nothing).float().mean())
        if known < LEAST_ACCURACY:
            raise ContractError(
                f"{self.name}: its judge finds a {self.class_name} in {known:.1%} of the photographs; "
                f"a judge has to in {LEAST_ACCURACY:.0%}"
            )


def _mean(values: Tensor) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval, by the normal law."""
    mean = float(values.double().mean())
    error = float(values.double().std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return mean, mean - SPREAD * error, mean + SPREAD * error


class Clip:
    """A CLIP as a judge: unit vectors of images and of texts."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        with quiet(), complaining("judge", f"no CLIP is loaded from {str(folder)!r}"):
            self.network: Any = library("CLIPModel", "transformers").from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        self.network.eval().requires_grad_(False).to(device)
        text = self.network.config.text_config
        self.tokenizer = clip_tokenizer(folder, text.vocab_size, "judge")
        self.length = int(text.max_position_embeddings)
        self.side = int(self.network.config.vision_config.image_size)
        self.device = device

    def texts(self, texts: Sequence[str]) -> Tensor:
        """``[N, d]``."""
        told = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            found = self.network.text_model(**{k: v.to(self.device) for k, v in told.items()}).pooler_output
            return functional.normalize(self.network.text_projection(found), dim=-1)

    def images(self, images: Tensor) -> Tensor:
        """``[N, d]`` of images in [0, 1], as CLIP's own preprocessing sees them."""
        mean, deviation = (torch.tensor(x, device=images.device).view(3, 1, 1) for x in (MEAN, DEVIATION))
        small = functional.interpolate(
            images, size=(self.side, self.side), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        found = self.network.vision_model(pixel_values=(small - mean) / deviation).pooler_output
        return functional.normalize(self.network.visual_projection(found), dim=-1)


MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pixels that CLIP was trained on."""
