"""CIBHash against its formula, written out in float64."""

import math

import pytest
import torch
from torch import Tensor

from hashengine import methods
from hashengine.errors import InputError
from hashengine.methods.base import Batch, View
from hashengine.methods.cibhash import _contrastive, _divergence

TEMPERATURE, WEIGHT = 0.3, 0.001


def activations(count: int, bits: int, seed: int) -> Tensor:
    return torch.randn(count, bits, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(first: Tensor, second: Tensor) -> Batch:
    return Batch(first, first, torch.zeros(len(first), dtype=torch.int64), View(second, second))


def by_hand(first: list[list[float]], second: list[list[float]]) -> tuple[float, float]:
    """The contrastive loss and the mean divergence of two views, computed by loops over numbers."""
    codes = [[1.0 if value >= 0 else -1.0 for value in row] for row in first + second]
    count, views = len(first), len(codes)

    def similarity(i: int, j: int) -> float:
        product = sum(a * b for a, b in zip(codes[i], codes[j], strict=True))
        return product / len(codes[i]) / TEMPERATURE  # the norm of every code is sqrt(bits)

    contrastive = 0.0
    for i in range(views):
        others = sum(math.exp(similarity(i, j)) for j in range(views) if j != i)
        contrastive -= math.log(math.exp(similarity(i, (i + count) % views)) / others) / views

    def sigmoid(value: float) -> float:
        return 1 / (1 + math.exp(-value))

    def divergence(ours: list[list[float]], theirs: list[list[float]]) -> float:
        total = 0.0
        for row, other in zip(ours, theirs, strict=True):
            for p, q in zip(map(sigmoid, row), map(sigmoid, other), strict=True):
                total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        return total / count

    return contrastive, (divergence(first, second) + divergence(second, first)) / 2


def test_the_loss_equals_a_calculation_by_hand():
    first, second = activations(5, 8, 0), activations(5, 8, 1)
    terms = methods.create("cibhash").loss(batch(first, second), 0, 1)
    contrastive, divergence = by_hand(first.tolist(), second.tolist())
    assert list(terms) == ["contrastive", "bottleneck"]
    assert terms["contrastive"].item() == pytest.approx(contrastive, rel=1e-12)
    assert terms["bottleneck"].item() == pytest.approx(WEIGHT * divergence, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_neither_the_loss_nor_its_gradient(dtype):
    first, second = (activations(6, 32, seed).to(dtype).requires_grad_() for seed in (0, 1))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            terms = methods.create("cibhash").loss(batch(first, second), 0, 1)
        results.append([*terms.values(), *torch.autograd.grad(sum(terms.values()), (first, second))])
    assert results[1][0].dtype == torch.promote_types(dtype, torch.float32)
    for plain, under_autocast in zip(*results, strict=True):
        torch.testing.assert_close(under_autocast, plain, rtol=0, atol=0)


def test_options_change_the_terms():
    first, second = activations(5, 8, 0), activations(5, 8, 1)
    plain, changed = (
        methods.create("cibhash", **options).loss(batch(first, second), 0, 1)
        for options in ({}, {"temperature": 1.0, "bottleneck_weight": 0.01})
    )
    assert plain["contrastive"] != changed["contrastive"]
    torch.testing.assert_close(changed["bottleneck"], 10 * plain["bottleneck"])


def test_the_gradients_of_the_smooth_parts_agree_with_finite_differences():
    first, second = (activations(4, 6, seed).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda a, b: _contrastive(a, b, TEMPERATURE), (first, second))
    assert torch.autograd.gradcheck(lambda a: _divergence(a, second.detach()), (first,))


def test_the_gradient_reaches_the_activations_through_sigmoid():
    first, second = activations(4, 6, 0).requires_grad_(), activations(4, 6, 1)
    methods.create("cibhash", bottleneck_weight=0).loss(batch(first, second), 0, 1)["contrastive"].backward()
    codes = [torch.where(u >= 0, 1.0, -1.0).double().detach().requires_grad_() for u in (first, second)]
    _contrastive(*codes, TEMPERATURE).backward()
    p = torch.sigmoid(first.detach())
    torch.testing.assert_close(first.grad, codes[0].grad * p * (1 - p))


def test_only_the_first_distribution_of_a_divergence_gets_a_gradient():
    """The bottleneck is the mean of the divergences D(first, second) and D(second, first)."""
    first, second = (activations(4, 6, seed).requires_grad_() for seed in (0, 1))
    (methods.create("cibhash").loss(batch(first, second), 0, 1)["bottleneck"] * 2 / WEIGHT).backward()
    alone = activations(4, 6, 0).requires_grad_()
    _divergence(alone, second.detach()).backward()
    torch.testing.assert_close(first.grad, alone.grad)


def test_equal_views_have_no_divergence_and_a_lower_contrastive_loss_than_shuffled_ones():
    u = activations(6, 32, 0)
    terms = methods.create("cibhash").loss(batch(u, u), 0, 1)
    assert terms["bottleneck"].item() == 0
    shuffled = methods.create("cibhash").loss(batch(u, u.roll(1, 0)), 0, 1)
    assert terms["contrastive"] < shuffled["contrastive"]


def test_bits_with_a_probability_of_0_or_1_have_a_finite_divergence():
    u = torch.full((2, 4), 1000.0, requires_grad=True)
    value = _divergence(u, -u.detach())
    value.backward()
    assert value.item() == pytest.approx(4 * 1000.0) and bool(torch.isfinite(u.grad).all())


def test_a_missing_view_and_a_single_image_are_rejected():
    u = activations(4, 6, 0)
    with pytest.raises(InputError, match="^cibhash: batch must be two views of each image, got one"):
        methods.create("cibhash").loss(Batch(u, u, torch.zeros(4)), 0, 1)
    with pytest.raises(InputError, match="^cibhash: batch must be at least 2 images, got 1"):
        methods.create("cibhash").loss(batch(u[:1], u[:1]), 0, 1)


def test_the_head_has_the_hidden_units_of_the_option():
    first, _, last = methods.create("cibhash", hidden=20).head(8, 16)
    assert (first.out_features, last.in_features, last.out_features) == (20, 20, 16)


def test_the_loss_works_on_a_device_without_autocast():
    views = (activations(5, 8, seed).to("meta") for seed in (0, 1))
    terms = methods.create("cibhash").loss(batch(*views), 0, 1)
    assert all(term.is_meta and term.shape == () for term in terms.values())
