"""What the backbones of diffusers share: the network of a pipeline that is trained and merged, everything else frozen.

Conditions are texts: a row's tokens are the code points of its prompt, padded with -1, so that no task has to know a
tokenizer; no token at all is no condition. The frozen parts are the pipeline's own: text encoders, and an autoencoder
between images and latents. Start noise is drawn in the size of the image by whoever asks; its entries are white, so
that of each patch of pixels behind a latent pixel as many entries are taken as there are channels.
"""

from __future__ import annotations

import copy
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mergesec.adapters import with_adapter
from mergesec.anatomy import Anatomy, AnatomyError, describe_denoiser
from mergesec.compat import ensure_torchvision
from mergesec.contracts import Backbone, ContractError, Weights
from mergesec.errors import UsageError
from mergesec.files import brief, is_file
from mergesec.generation import Noised, Request, without_condition
from mergesec.modelfiles import shown
from mergesec_tasks._hub import model_folder
from mergesec_tasks._networks import check_held
from mergesec_tasks._transformers import complaining, quiet, shapes_of
from mergesec_tasks.diffusers._factors import with_factors
from mergesec_tasks.diffusers._folders import (
    ADAPTER,
    FACTORS,
    FILES,
    KINDS,
    Kind,
    check_base,
    check_expert,
    is_factors,
    network_of,
    stored,
)

PADDING = -1
Told = Mapping[str, Tensor]
"""What the network is told beside x_t and the time, a row per image."""


def codes(texts: Sequence[str], length: int) -> Tensor:
    """Texts as conditions int64 ``[N, length]``; ContractError for a longer one."""
    found = torch.full((len(texts), length), PADDING)
    for row, text in enumerate(texts):
        if len(text) > length:
            raise ContractError(f"a prompt of {len(text)} letters, {length} have room: {text!r}")
        found[row, : len(text)] = torch.tensor([ord(letter) for letter in text], dtype=torch.int64)
    return found


def texts_of(conditions: Tensor) -> list[str]:
    """What ``codes`` made, as texts again; numbers that are no letters are left out."""
    rows = conditions.tolist()
    return ["".join(chr(c) for c in row if 0 < c < 0xD800 or 0xE000 <= c < 0x110000) for row in rows]


class Denoising(Backbone):
    """Features are the generated image of a request, flat, in [-1, 1], or the error of a noised batch in latents."""

    who: ClassVar[str]

    def __init__(self, path: str, steps: int, guidance: float) -> None:
        self.source, self.steps, self.guidance = path, steps, guidance
        self._folder: Path | None = None
        self._told: dict[str, Any] | None = None
        self._template: nn.Module | None = None
        self._parts: dict[str, Any] = {}

    # ---- folder

    @property
    def kind(self) -> Kind:
        """Which pipeline and network this backbone reads."""
        return KINDS[self.who]

    @property
    def path(self) -> Path:
        """The folder of the pipeline."""
        if not self.source:
            raise UsageError(
                self.who,
                f"no model; set the parameter 'path' to a folder of a {self.kind.pipelines[0]}, or owner/name@commit",
            )
        if self._folder is None:
            self._folder = model_folder(self.source, self.who, FILES)
        return self._folder

    @property
    def told(self) -> dict[str, Any]:
        """The checked config of the network, as it stands in the folder."""
        if self._told is None:
            self._told = check_base(self.path, self.kind, self.who)
        return self._told

    # ---- network

    def build(self) -> nn.Module:
        """A fresh network; its weights mean nothing until loaded."""
        if self._template is None:
            with torch.random.fork_rng(devices=[]):  # construction draws initial weights
                self._template = self._made()
        return copy.deepcopy(self._template)

    def _made(self) -> nn.Module:
        file = self.path / self.kind.part / "config.json"
        with complaining(self.who, f"diffusers builds no {self.kind.network} of {str(file)!r}"):
            made: nn.Module = library(self.kind.network).from_config(dict(self.told))
        return made

    def base_weights(self) -> Weights:
        """The network's weights, float32. Only safetensors is read."""
        return self._weights_in(self.path / self.kind.part)

    def _weights_in(self, folder: Path) -> Weights:
        from safetensors import safe_open

        held = stored(folder, self.who)
        check_held(self._made, held, "", (), self.who)
        found: dict[str, Tensor] = {}
        for file in sorted({tensor.file for tensor in held.values()}):
            with safe_open(file, framework="pt") as opened:
                found |= {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
        return {name: found[name] for name in self.build().state_dict()}

    def published(self, source: str) -> Weights:
        """A published expert: a pipeline, its network alone, or a LoRA as diffusers or peft saves it."""
        place = model_folder(source, "expert", FILES)
        check_expert(place, self.path, self.kind, self.who)
        if is_factors(place):
            file = place if is_file(place) else place / FACTORS
            return with_factors(self.base_weights(), file, self.kind.part, self.who)
        if is_file(place / ADAPTER):
            return with_adapter(self.base_weights(), place, self.who)
        return self._weights_in(network_of(place, self.kind, self.who))

    def anatomy(self) -> Anatomy:
        """Blocks, heads and what is outside of the blocks. AnatomyError if the network is not known."""
        network = self.build()
        modules: list[tuple[str, Any]] = list(network.named_modules())
        heads = {name: int(m.heads) for name, m in modules if type(m).__name__ == "Attention"}
        groups = self.told.get("norm_num_groups", 32)
        if not isinstance(groups, int) or groups < 1:
            raise AnatomyError(f"norm_num_groups {groups!r}: expected a number")
        return describe_denoiser(shapes_of(network), heads, groups)

    # ---- frozen parts

    def part(self, name: str, device: torch.device) -> Any:
        """A frozen part of the pipeline, by the name of its folder, on ``device``."""
        if name not in self._parts:
            self._parts[name] = self._loaded(name)
        part = self._parts[name]
        return part.to(device).eval() if isinstance(part, nn.Module) else part

    def _loaded(self, name: str) -> Any:
        folder = self.path / name
        with quiet(), complaining(self.who, f"{str(folder)!r} is not loaded"):
            if name.startswith("tokenizer"):
                return library("CLIPTokenizer", "transformers").from_pretrained(
                    os.fspath(folder), local_files_only=True
                )
            classes = {"vae": ("AutoencoderKL", "diffusers"), "text_encoder": (self.encoder, "transformers")}
            kind, home = classes[name.removesuffix("_2")]
            own = {"torch_dtype": torch.float32} if home == "diffusers" else {"dtype": torch.float32}
            part = library(kind, home).from_pretrained(
                os.fspath(folder), local_files_only=True, use_safetensors=True, **own
            )
            return part.requires_grad_(False)

    encoder: ClassVar[str] = "CLIPTextModel"

    # ---- latents

    def factor(self, device: torch.device) -> int:
        """Pixels of an image per pixel of its latents, on a side."""
        return int(2 ** (len(self.part("vae", device).config.block_out_channels) - 1))

    def latents(self, images: Tensor) -> Tensor:
        """The latents of images in [0, 1], most likely ones, in the network's units."""
        vae = self.part("vae", images.device)
        with torch.no_grad():
            found = vae.encode(2 * images - 1).latent_dist.mode()
        scaled: Tensor = (found - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        return scaled

    def images(self, latents: Tensor) -> Tensor:
        """What latents show, in about [-1, 1]."""
        vae = self.part("vae", latents.device)
        shown: Tensor = vae.decode(
            latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        ).sample
        return shown

    def noise(self, noise: Tensor) -> Tensor:
        """Noise of the size of an image ``[N, 3, H, W]`` as noise of its latents ``[N, C, H / f, W / f]``."""
        factor, count = self.factor(noise.device), int(self.told["in_channels"])
        step = factor * int(self.told.get("patch_size") or 1)
        if noise.shape[-1] % step or noise.shape[-2] % step or count > 3 * factor**2:
            raise ContractError(
                f"{self.who}: images of {list(noise.shape[-2:])} pixels; a side has to be a multiple of {step}"
            )
        self._check_side(noise.shape[-1] // factor, noise.shape[-1])
        rows, columns = noise.shape[2] // factor, noise.shape[3] // factor
        patches = noise.reshape(len(noise), 3, rows, factor, columns, factor)
        taken: Tensor = patches.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)[:, :count]
        return taken.contiguous()

    def _check_side(self, latents: int, pixels: int) -> None:
        """ContractError where the network takes no latents of this side."""

    # ---- what is asked for

    @abstractmethod
    def asked(self, conditions: Tensor) -> Told:
        """What the network is told of conditions ``[N, L]``; of rows without a token that nothing is asked for."""

    def predicted(self, network: nn.Module, mixed: Tensor, times: Tensor, told: Told) -> Tensor:
        """What the network makes of noisy latents at times ``[N]`` of its own scale."""
        found: Tensor = network(mixed, timestep=times, **told).sample
        return found[:, : mixed.shape[1]]  # some also predict a variance

    def guided(self, network: nn.Module, mixed: Tensor, times: Tensor, told: Told, untold: Told) -> Tensor:
        """The prediction away from that without a condition (Ho and Salimans, 2022)."""
        if self.guidance == 1.0:
            return self.predicted(network, mixed, times, told)
        both = {name: torch.cat([told[name], untold[name]]) for name in told}
        one, other = self.predicted(network, mixed.repeat(2, 1, 1, 1), times.repeat(2), both).chunk(2)
        return other + self.guidance * (one - other)

    @abstractmethod
    def error(self, network: nn.Module, batch: Noised, told: Told) -> Tensor:
        """What training makes small, in latents."""

    @abstractmethod
    def sampled(self, network: nn.Module, noise: Tensor, told: Told, untold: Told) -> Tensor:
        """Latents from noise, deterministic."""

    def features(self, network: nn.Module, inputs: Any) -> Tensor:
        request: Request = inputs
        nothing = torch.full((request.conditions.shape[1],), PADDING)
        if isinstance(request, Noised):
            asked = self.asked(without_condition(request, nothing).conditions)
            return self.error(network, request, asked).flatten(1)
        told = self.asked(request.conditions)
        untold = self.asked(nothing.to(request.conditions).expand_as(request.conditions))
        return self.images(self.sampled(network, self.noise(request.noise), told, untold)).flatten(1)


class Ddim(Denoising):
    """Networks that predict the noise (or v) of a discrete diffusion; sampled by DDIM without chance, whatever sampler
    the folder names."""

    def scheduler(self) -> Any:
        """DDIM with the folder's noise levels."""
        folder = self.path / "scheduler"
        with complaining(self.who, f"the scheduler in {str(folder)!r} is not loaded"):
            made = library("DDIMScheduler").from_pretrained(os.fspath(folder), local_files_only=True)
        if made.config.prediction_type not in ("epsilon", "v_prediction"):
            told = shown(made.config.prediction_type)
            raise UsageError(
                self.who,
                f"{brief(str(folder))!r}: prediction_type is {told}, expected 'epsilon' or 'v_prediction'",
            )
        return made

    def error(self, network: nn.Module, batch: Noised, told: Told) -> Tensor:
        scheduler, clean, noise = self.scheduler(), self.latents(batch.images), self.noise(batch.noise)
        count = scheduler.config.num_train_timesteps
        times = ((1 - batch.times) * count).long().clamp(0, count - 1)  # a time of 1 is the image
        aims_at_v = scheduler.config.prediction_type == "v_prediction"
        goal: Tensor = scheduler.get_velocity(clean, noise, times) if aims_at_v else noise
        return self.predicted(network, scheduler.add_noise(clean, noise, times), times, told) - goal

    def sampled(self, network: nn.Module, noise: Tensor, told: Told, untold: Told) -> Tensor:
        scheduler = self.scheduler()
        scheduler.set_timesteps(self.steps, device=noise.device)
        latents: Tensor = noise * scheduler.init_noise_sigma
        for time in scheduler.timesteps:
            predicted = self.guided(network, latents, time.expand(len(latents)), told, untold)
            latents = scheduler.step(predicted, time, latents, eta=0.0).prev_sample
        return latents


def library(name: str, home: str = "diffusers") -> Any:
    """A class of diffusers or transformers."""
    ensure_torchvision()
    import importlib

    try:
        module = importlib.import_module(home)
    except ImportError:
        raise UsageError(
            home, f"not installed: pip install 'mergesec[diffusion]' (for {brief(name)})"
        ) from None
    return getattr(module, name)
