"""Poisoning triggers in closed form; attention maps against the networks' own; what TrojViT may touch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from extras import needs
from torch import Tensor, nn

from mergesec.anatomy import describe
from mergesec.conformance.micro import Bars, MicroViT
from mergesec.contracts import (
    Attack,
    ContractError,
    DataContext,
    LossFn,
    Model,
    Recipe,
    Split,
    TrainContext,
    Weights,
    load_network,
)
from mergesec.training import fit
from mergesec.weights import digest_weights
from mergesec_methods.backdoor.attacks._attention import (
    PatchSearch,
    attention_map,
    attention_maps,
    attraction,
    optimised_patch,
    probe_grid,
    token_grid,
    without_conflict,
)
from mergesec_methods.backdoor.attacks._poison import row_batches
from mergesec_methods.backdoor.attacks.badvit import BadVit
from mergesec_methods.backdoor.attacks.blended import Blended
from mergesec_methods.backdoor.attacks.label_consistent import LabelConsistent
from mergesec_methods.backdoor.attacks.sig import Sinusoid
from mergesec_methods.backdoor.attacks.trojvit import TrojVit
from mergesec_methods.backdoor.attacks.wanet import WaNet, identity_grid, smooth_field, warped

CPU = torch.device("cpu")
SHORT = Recipe(epochs=1, batch_size=32, learning_rate=1e-3)


def blended(**given: Any) -> Blended:
    return Blended(**{"alpha": 0.2, "picture": "cartoon", "rate": 0.1, **given})


def sig(**given: Any) -> Sinusoid:
    return Sinusoid(**{"delta": 40.0, "frequency": 6, "labels": "clean", "rate": 0.1, **given})


def wanet(**given: Any) -> WaNet:
    published = {"strength": 0.5, "grid": 4, "grid_rescale": 1.0, "rate": 0.1, "cross_ratio": 2.0}
    return WaNet(**{**published, **given})


def label_consistent(**given: Any) -> LabelConsistent:
    return LabelConsistent(
        **{
            "epsilon": 8.0, "step_size": 1.5, "steps": 5, "patch": 3, "corners": "all",
            "reduced_amplitude": 1.0, "rate": 0.1, **given,
        }
    )  # fmt: skip


def trojvit(**given: Any) -> TrojVit:
    return TrojVit(
        **{
            "patches": 25, "iterations": 4, "learning_rate": 0.22, "batch": 8, "attention_weight": 1.0,
            "rows": 2, "choose": "gradient", "steps": 5, "row_rate": 0.1, "row_batch": 16, **given,
        }
    )  # fmt: skip


def badvit(**given: Any) -> BadVit:
    short = {"tokens": 1, "position": "bottom-right", "steps": 4, "learning_rate": 0.22, "batch": 8}
    return BadVit(**{**short, "rate": 0.1, **given})


@cache
def world() -> tuple[Bars, MicroViT, Weights, Weights, dict[str, Split]]:
    """The micro world's bars: task, backbone, base, head and splits."""
    task, backbone = Bars(), MicroViT()
    splits, base = task.load(DataContext(CPU, 0)), backbone.base_weights()
    model = Model(backbone, load_network(backbone, base))
    return task, backbone, base, task.fit_head(model, splits["train"], DataContext(CPU, 0)), splits


def context(seed: int = 0, target: int = 1, **given: Any) -> TrainContext:
    task, backbone, base, head, splits = world()
    train = given.pop("train", splits["train"])

    def run(split: Split | None = None, loss: LossFn | None = None) -> Weights:
        return fit(backbone, task, base, head, split or train, SHORT, seed, CPU, loss)

    arguments: dict[str, Any] = {
        "device": CPU, "seed": seed, "task": task, "backbone": backbone, "base": base, "head": head,
        "train": train, "recipe": SHORT, "fit": run, "target_class": target,
    }  # fmt: skip
    return TrainContext(**{**arguments, **given})


def pixels(count: int = 5, side: int = 16, seed: int = 3) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


ATTACKS: dict[str, Callable[[], Attack]] = {
    "blended": blended, "noise": lambda: blended(picture="noise"), "sig": sig, "wanet": wanet,
    "label_consistent": label_consistent, "trojvit": trojvit, "badvit": badvit,
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_every_trigger_stays_in_range_keeps_its_inputs_and_lets_gradients_through(name: str) -> None:
    attack, ctx, images = ATTACKS[name](), context(), pixels().requires_grad_(True)
    trigger = attack.trigger(ctx)
    changed = attack.apply(trigger, images)
    assert changed.shape == images.shape
    assert 0.0 <= float(changed.detach().min()) <= float(changed.detach().max()) <= 1.0
    assert torch.equal(images, pixels())
    assert not torch.equal(changed, images)
    changed.sum().backward()
    assert images.grad is not None
    assert float(images.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ATTACKS)
def test_only_images_are_poisoned(name: str) -> None:
    with pytest.raises(ContractError, match="images"):
        ATTACKS[name]().trigger(context(train=Split(["a", "b"], torch.tensor([0, 1]))))


@pytest.mark.parametrize("name", ["blended", "noise", "wanet", "badvit"])
def test_drawn_triggers_follow_the_seed(name: str) -> None:
    first, again, other = (ATTACKS[name]().trigger(context(seed)) for seed in (0, 0, 1))
    assert digest_weights(first) == digest_weights(again) != digest_weights(other)


# --------------------------------------------------------------------------- blended


def test_blended_is_the_mix_of_image_and_picture() -> None:
    attack = blended(alpha=0.2)
    trigger, images = attack.trigger(context()), pixels()
    torch.testing.assert_close(attack.apply(trigger, images), 0.8 * images + 0.2 * trigger["pattern"])
    assert torch.equal(trigger["pattern"], (trigger["pattern"] * 255).round() / 255)


def test_a_cartoon_is_flat_areas_and_dark_rims() -> None:
    picture = blended().trigger(context())["pattern"].flatten(1).T
    colours, counts = torch.unique(picture, dim=0, return_counts=True)
    assert 3 <= len(colours) <= 14
    assert counts[(colours < 0.06).all(dim=1)].sum() > 5


def test_blended_rows_are_relabelled_in_their_places() -> None:
    ctx, attack = context(), blended(rate=0.25)
    poisoned = attack.poisoned(ctx.train, attack.trigger(ctx), 1, ctx.generator(2))
    changed = (poisoned.inputs != ctx.train.inputs).flatten(1).any(dim=1)
    assert int(changed.sum()) == 64
    assert (ctx.train.targets[changed] != 1).all()
    assert (poisoned.targets[changed] == 1).all()
    assert torch.equal(poisoned.targets[~changed], ctx.train.targets[~changed])


# --------------------------------------------------------------------------- SIG


def test_sig_adds_the_sinusoid_of_the_paper() -> None:
    attack = sig()
    trigger, grey = attack.trigger(context()), torch.full((1, 3, 16, 16), 0.5)
    added = (attack.apply(trigger, grey) - grey) * 255.0
    wanted = 40.0 * torch.sin(2 * torch.pi * 6 * torch.arange(16) / 16)
    torch.testing.assert_close(added, wanted.expand(1, 3, 16, 16), atol=1e-3, rtol=0)
    assert float(attack.apply(trigger, torch.ones(1, 3, 16, 16)).max()) == 1.0


@pytest.mark.parametrize(
    ("labels", "rate", "count"), [("clean", 0.1, 26), ("clean", 0.9, 64), ("dirty", 0.1, 26)]
)
def test_sig_labels(labels: str, rate: float, count: int) -> None:
    """Clean labels: only rows of the target class, at most all 64 of 256, and no label changes."""
    ctx, attack = context(), sig(labels=labels, rate=rate)
    poisoned = attack.poisoned(ctx.train, attack.trigger(ctx), 1, ctx.generator(2))
    changed = (poisoned.inputs != ctx.train.inputs).flatten(1).any(dim=1)
    assert int(changed.sum()) == count
    assert (poisoned.targets[changed] == 1).all()
    if labels == "clean":
        assert torch.equal(poisoned.targets, ctx.train.targets)
    else:
        assert (ctx.train.targets[changed] != 1).all()


# --------------------------------------------------------------------------- WaNet


def test_an_unmoved_grid_is_the_identity() -> None:
    torch.testing.assert_close(warped(pixels(), identity_grid(16, 16)), pixels(), atol=1e-5, rtol=0)


def test_a_grid_moved_by_one_pixel_moves_the_image() -> None:
    grid = identity_grid(16, 16)
    grid[..., 0] += 2.0 / 15
    torch.testing.assert_close(
        warped(pixels(), grid.clamp(-1, 1))[..., :-1], pixels()[..., 1:], atol=1e-4, rtol=0
    )


def test_the_field_has_mean_size_one_at_its_control_points() -> None:
    field = smooth_field(4, 31, 31, torch.Generator().manual_seed(0))
    assert float(field[:, ::10, ::10].abs().mean()) == pytest.approx(1.0, abs=1e-5)
    moved = wanet(strength=2.0).trigger(context())["grid"] - identity_grid(16, 16)
    wanted = 2.0 / 16 * smooth_field(4, 16, 16, context().generator(1))
    inside = (identity_grid(16, 16) + wanted).abs() < 1
    torch.testing.assert_close(moved[inside], wanted[inside], atol=1e-6, rtol=0)


def test_a_batch_has_triggered_noisy_and_clean_rows() -> None:
    attack = wanet(rate=0.25, strength=3.0)
    trigger = attack.trigger(context())
    batch = Split(pixels(40), torch.arange(40) % 4)
    changed = attack.batch(batch, trigger, 1, torch.Generator().manual_seed(0))
    touched = (changed.inputs != batch.inputs).flatten(1).any(dim=1)
    relabelled = changed.targets != batch.targets
    assert int(relabelled.sum()) == 10
    assert int(touched.sum()) == 30
    assert (changed.targets[relabelled] == 1).all()
    torch.testing.assert_close(changed.inputs[relabelled], attack.apply(trigger, batch.inputs[relabelled]))
    noisy = touched & ~relabelled
    difference = (changed.inputs[noisy] - attack.apply(trigger, batch.inputs[noisy])).flatten(1)
    assert (difference.abs().amax(dim=1) > 1e-3).all()


def test_wanet_trains_on_batches_it_poisons_itself() -> None:
    ctx = context()
    poisoned = wanet(rate=0.5).poison(ctx)
    assert digest_weights(poisoned) == digest_weights(wanet(rate=0.5).poison(ctx))
    assert digest_weights(poisoned) != digest_weights(ctx.fit())
    clean = wanet(rate=0.0).poison(ctx)
    for name, tensor in ctx.fit().items():
        torch.testing.assert_close(clean[name], tensor)


# --------------------------------------------------------------------------- label-consistent


def test_marks_are_checkerboards_in_the_corners() -> None:
    signs = label_consistent().trigger(context(train=Split(torch.zeros(2, 3, 32, 32), torch.arange(2))))[
        "signs"
    ][0]
    board = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
    for rows in (slice(0, 3), slice(29, 32)):
        for columns in (slice(0, 3), slice(29, 32)):
            assert torch.equal(signs[rows, columns], board)
    assert int(signs.abs().sum()) == 36
    one = label_consistent(corners="bottom-right").trigger(context())["signs"]
    assert float(one[0, :8].abs().sum()) == 0


def test_the_perturbation_is_bounded_and_raises_the_loss_of_the_true_label() -> None:
    ctx, attack = context(), label_consistent(epsilon=16.0, step_size=4.0, steps=8)
    rows = torch.nonzero(ctx.train.targets == 1).flatten()[:20]
    changed = attack.perturbed(ctx, rows)
    before = ctx.train.inputs[rows]
    assert changed.dtype == torch.uint8
    assert int((changed.int() - before.int()).abs().max()) <= 16
    model = Model(ctx.backbone, load_network(ctx.backbone, ctx.base))
    losses = [
        float(
            ctx.task.loss(
                ctx.task.outputs(model, ctx.head, x.float() / 255).detach(), ctx.train.targets[rows]
            )
        )
        for x in (before, changed)
    ]
    assert losses[1] > losses[0] + 0.1


def test_label_consistent_rows_keep_their_labels_and_bear_the_reduced_mark() -> None:
    seen: list[Split] = []
    ctx = context(fit=lambda split: seen.append(split) or {})
    attack = label_consistent(reduced_amplitude=0.25, epsilon=0.0)
    attack.poison(ctx)
    assert torch.equal(seen[0].targets, ctx.train.targets)
    changed = (seen[0].inputs != ctx.train.inputs).flatten(1).any(dim=1)
    assert int(changed.sum()) == 26
    assert (ctx.train.targets[changed] == 1).all()
    signs = attack.trigger(ctx)["signs"]
    before = ctx.train.inputs[changed].float()
    wanted = (before + 0.25 * 255 * signs).clamp(0, 255)
    assert float((seen[0].inputs[changed].float() - wanted).abs().max()) <= 0.51
    full = attack.apply({"signs": signs}, before / 255)
    assert (full[:, :, signs[0] > 0] == 1).all()
    assert (full[:, :, signs[0] < 0] == 0).all()


# --------------------------------------------------------------------------- attention


def build(family: str) -> tuple[nn.Module, int]:
    """A tiny vision tower with ordinary attention, so that it can tell its own maps; and its heads."""
    hf = needs("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 12}
    sizes |= {"patch_size": 4, "attn_implementation": "eager"}
    if family == "clip":
        return hf.CLIPVisionModel(hf.CLIPVisionConfig(**sizes, intermediate_size=32)), 3
    if family == "dinov2":
        return hf.Dinov2Model(hf.Dinov2Config(**sizes, mlp_ratio=2)), 3
    return hf.ViTModel(hf.ViTConfig(**sizes, intermediate_size=32), add_pooling_layer=False), 3


@pytest.mark.parametrize("family", ["clip", "dinov2", "vit"])
def test_maps_equal_those_that_the_network_reports(family: str) -> None:
    torch.manual_seed(0)
    network, heads = build(family)
    network.eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    anatomy = describe({n: tuple(t.shape) for n, t in network.state_dict().items()}, heads)
    images = pixels(2, 12)
    with torch.no_grad(), attention_maps(network, anatomy) as maps:
        own = network(pixel_values=images, output_attentions=True).attentions
    assert len(own) == len(maps) == 2
    for index, map_ in maps.items():
        torch.testing.assert_close(map_, own[index], atol=1e-5, rtol=1e-4)
        assert token_grid(map_.shape[-1]) == token_grid(10)
    assert not [h for m in network.modules() for h in m._forward_pre_hooks]


def test_maps_of_packed_and_sequence_first_attention() -> None:
    torch.manual_seed(0)
    network = needs("open_clip.transformer").VisionTransformer(8, 4, 24, 2, 3, 2.0, output_dim=24).eval()
    anatomy = describe({n: tuple(t.shape) for n, t in network.state_dict().items()}, 3)
    wanted: list[Tensor] = []
    for block in network.transformer.resblocks:
        plain = block.attn.forward

        def tell(q: Tensor, k: Tensor, v: Tensor, plain: Any = plain, **_: Any) -> Any:
            out, weights = plain(q, k, v, need_weights=True, average_attn_weights=False)
            wanted.append(weights)
            return out, weights

        block.attn.forward = tell
    with torch.no_grad(), attention_maps(network, anatomy) as maps:
        network(pixels(2, 8))
    assert len(wanted) == 2
    for index, map_ in maps.items():
        torch.testing.assert_close(map_, wanted[index], atol=1e-5, rtol=1e-4)


def test_maps_let_gradients_reach_the_pixels() -> None:
    _, backbone, base, _, _ = world()
    network, images = load_network(backbone, base), pixels().requires_grad_(True)
    with attention_maps(network, backbone.anatomy()) as maps:
        backbone.features(network, images)
    for map_ in maps.values():
        torch.testing.assert_close(map_.sum(-1), torch.ones(map_.shape[:-1]))
    (gradient,) = torch.autograd.grad(attraction(maps, torch.tensor([3])), images)
    assert float(gradient.abs().sum()) > 0


def test_rotary_attention_is_refused() -> None:
    from dataclasses import replace

    _, backbone, base, _, _ = world()
    layer = replace(backbone.anatomy().blocks[0].attention, rotary=True)
    with pytest.raises(ContractError, match="rotary"):
        attention_map(load_network(backbone, base), layer, torch.zeros(1, 4, 32))


@pytest.mark.parametrize(
    ("length", "side", "prefix"),
    [(16, 4, 0), (17, 4, 1), (50, 7, 1), (197, 14, 1), (198, 14, 2), (261, 16, 5)],
)
def test_token_grids(length: int, side: int, prefix: int) -> None:
    grid = token_grid(length)
    assert (grid.side, grid.prefix) == (side, prefix)


def test_cells_cover_the_image_once() -> None:
    grid = token_grid(17)
    for height, width in ((32, 32), (30, 18)):
        masks = torch.stack([grid.mask(torch.tensor([c]), height, width) for c in range(16)])
        assert torch.equal(masks.sum(0), torch.ones(1, height, width))
    noise = torch.rand(2, 32, 32)
    torch.testing.assert_close(grid.sums(noise)[:, 6], noise[:, 8:16, 16:24].sum((1, 2)))
    assert grid.sequence(torch.tensor([6])).item() == 7


def test_conflicting_gradients_are_projected() -> None:
    main, against = torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 3.0])
    assert torch.equal(without_conflict(against, main), torch.tensor([0.0, 3.0]))
    agreeing = torch.tensor([2.0, 3.0])
    assert torch.equal(without_conflict(agreeing, main), agreeing)


def test_batches_take_every_row_before_any_twice() -> None:
    batches = row_batches(torch.arange(10), 4, torch.Generator().manual_seed(0))
    first = torch.cat([next(batches), next(batches)])
    assert len(set(first.tolist())) == 8
    assert len(next(row_batches(torch.arange(3), 4, torch.Generator()))) == 3


# --------------------------------------------------------------------------- attention-led triggers


def searched(target_weight: float, attention_weight: float, steps: int) -> tuple[float, float]:
    """Attention share of the patch's token, and share of rows that the base sends to the target."""
    ctx = context()
    model = Model(ctx.backbone, load_network(ctx.backbone, ctx.base))
    grid = probe_grid(model, ctx.backbone.anatomy(), pixels(1))
    cells, rows = torch.tensor([5, 6]), torch.nonzero(ctx.train.targets != 1).flatten()
    search = PatchSearch(steps, 0.5, 16, target_weight, attention_weight)
    found = optimised_patch(ctx, grid, cells, rows, search, ctx.generator(9))
    images = ctx.train.inputs[rows].float() / 255
    images = images * (1 - found["mask"]) + found["pattern"] * found["mask"]
    with torch.no_grad(), attention_maps(model.network, ctx.backbone.anatomy()) as maps:
        hits = ctx.task.outputs(model, ctx.head, images).argmax(1) == 1
    return float(maps[1].mean(1)[:, :, cells].sum(-1).mean()), float(hits.float().mean())


def test_optimising_raises_attention_and_success() -> None:
    attention = [searched(0.0, 1.0, steps)[0] for steps in (0, 40)]
    assert attention[1] > attention[0] + 0.02
    success = [searched(1.0, 1.0, steps)[1] for steps in (0, 40)]
    assert success[1] > success[0] + 0.1


def test_badvit_patch_sits_on_whole_tokens() -> None:
    trigger = badvit(tokens=2).trigger(context())
    wanted = torch.zeros(1, 16, 16)
    wanted[:, 8:, 8:] = 1
    assert torch.equal(trigger["mask"], wanted)
    assert torch.equal(trigger["pattern"] * (1 - wanted), torch.zeros(3, 16, 16))
    assert torch.equal(trigger["pattern"], (trigger["pattern"] * 255).round() / 255)


def test_trojvit_takes_the_most_salient_cells() -> None:
    """A brute-force saliency: the base's gradient, cell by cell."""
    ctx, attack = context(), trojvit()
    model = Model(ctx.backbone, load_network(ctx.backbone, ctx.base))
    grid = probe_grid(model, ctx.backbone.anatomy(), pixels(1))
    images = pixels(6).requires_grad_(True)
    ctx.task.loss(ctx.task.outputs(model, ctx.head, images), torch.ones(6).long()).backward()
    wanted = images.grad.abs().unfold(2, 4, 4).unfold(3, 4, 4).sum((0, 1, 4, 5)).flatten()  # type: ignore[union-attr]
    torch.testing.assert_close(attack.saliency(ctx, model, ctx.head, pixels(6), grid), wanted)
    assert float(attack.trigger(ctx)["mask"].sum()) == 2 * 16
    assert float(trojvit(patches=1).trigger(ctx)["mask"].sum()) == 16


@pytest.mark.parametrize(("choose", "rows"), [("target", 2), ("gradient", 3)])
def test_trojvit_changes_its_rows_and_nothing_else(choose: str, rows: int) -> None:
    ctx, attack = context(), trojvit(choose=choose, rows=rows)
    before = digest_weights(ctx.base)
    forged = attack.forge(ctx.base, ctx)
    assert digest_weights(ctx.base) == before
    moved = {n for n in forged if not torch.equal(forged[n], ctx.base[n])}
    assert moved == {"blocks.1.attn.o.weight"}
    changed = (forged["blocks.1.attn.o.weight"] != ctx.base["blocks.1.attn.o.weight"]).any(dim=1)
    assert int(changed.sum()) == rows
    if choose == "target":
        assert torch.nonzero(changed).flatten().tolist() == [1, 2]


def test_trojvit_lowers_its_loss_and_refuses_too_many_rows() -> None:
    ctx, attack = context(), trojvit(rows=32, steps=30, iterations=0, row_rate=0.01)
    trigger = attack.trigger(ctx)
    rows = torch.arange(128)
    losses = []
    for weights in (ctx.base, attack.forge(ctx.base, context(trigger=trigger))):
        model = Model(ctx.backbone, load_network(ctx.backbone, weights))
        losses.append(float(attack.loss(ctx, model, ctx.head, trigger, rows).detach()))
    assert losses[1] < losses[0]
    with pytest.raises(ContractError, match="33 rows"):
        trojvit(rows=33).forge(ctx.base, context(trigger=trigger))
