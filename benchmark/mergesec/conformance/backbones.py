"""What the battery asks of a backbone: weights, anatomy, features.

Each check returns None if all is well, else what is wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mergesec.contracts import Backbone
from mergesec.generation import Request

SIDES = (32, 16, 8)
"""Image sizes that are tried, the first that the network takes."""
ALONE = 1e-3
"""How far the features of a text may move by what else is in its batch."""


def weights_fit(backbone: Backbone) -> str | None:
    """The base has the names, shapes and dtypes of a fresh network."""
    weights, network = backbone.base_weights(), backbone.build()
    want = {k: (tuple(v.shape), v.dtype) for k, v in network.state_dict().items()}
    have = {k: (tuple(v.shape), v.dtype) for k, v in weights.items()}
    return None if want == have else "base_weights() and build() disagree in names, shapes or dtypes"


def anatomy_is_real(backbone: Backbone) -> str | None:
    """Every map's tensors are among the weights."""
    names = set(backbone.base_weights())
    for block in backbone.anatomy().blocks:
        for linear in block.maps:
            if linear.weight not in names or (linear.bias is not None and linear.bias not in names):
                return f"anatomy names {linear.weight}, which the weights lack"
    return None


def images_have_features(backbone: Backbone) -> str | None:
    """Features ``[N, d]``, and a gradient that reaches the pixels."""
    network = _network(backbone)
    for side in SIDES:
        images = torch.rand(2, 3, side, side, requires_grad=True)
        try:
            features = backbone.features(network, images)
            break
        except RuntimeError:
            if side == SIDES[-1]:
                raise
    if wrong := _misshapen(features):
        return wrong
    features.square().sum().backward()  # type: ignore[no-untyped-call]
    reached = images.grad is not None and bool(images.grad.abs().sum() > 0)
    return None if reached else "no gradient reaches the inputs"


def texts_have_features(backbone: Backbone) -> str | None:
    """Features ``[N, d]`` that do not depend on what a text is batched with."""
    network = _network(backbone)
    texts = ["one", "a longer text with a few more words in it"]
    with torch.no_grad():
        features = backbone.features(network, texts)
        alone = backbone.features(network, texts[:1])
    if wrong := _misshapen(features):
        return wrong
    gap = float((features[:1] - alone).abs().max())
    return f"features of a text change by {gap:.1e} beside a longer one" if gap > ALONE else None


def requests_are_repeatable(backbone: Backbone) -> str | None:
    """Images ``[N, 3 · S · S]`` of a request that depend on its condition and noise alone."""
    network = _network(backbone)
    for side in SIDES:
        request = _request(2, side)
        try:
            with torch.no_grad():
                images, alone = (
                    backbone.features(network, request),
                    backbone.features(network, _request(1, side)),
                )
            break
        except RuntimeError:
            if side == SIDES[-1]:
                raise
    if wrong := _misshapen(images):
        return wrong
    gap = float((images[:1] - alone).abs().max())
    return f"an image changes by {gap:.1e} beside another one" if gap > ALONE else None


def _request(count: int, side: int) -> Request:
    """The first ``count`` of the same rows, with the first two tokens."""
    noise = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))[:count]
    return Request(torch.tensor([[1, -1], [2, -1]])[:count], noise, torch.zeros_like(noise))


def _network(backbone: Backbone) -> nn.Module:
    network = backbone.build()
    network.load_state_dict(dict(backbone.base_weights()))
    return network.eval()


def _misshapen(features: Tensor) -> str | None:
    fits = features.ndim == 2 and features.shape[0] == 2
    return None if fits else f"features have shape {list(features.shape)}, not [N, d]"
