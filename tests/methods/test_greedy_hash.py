"""Greedy hash against its formula, written out in float64."""

import math

import numpy as np
import pytest
import torch

from hashengine import methods
from hashengine.errors import InputError
from hashengine.methods.base import Batch


def method(alpha: float = 0.1, bits: int = 4, classes: int = 3) -> methods.HashingMethod:
    torch.manual_seed(0)
    made = methods.create("greedy_hash", alpha=alpha)
    made.add_parameters(bits, classes)
    return made.double()


def batch(u: torch.Tensor, targets: torch.Tensor) -> Batch:
    return Batch(u, u, targets)


def test_the_loss_equals_a_calculation_by_hand():
    made = method(alpha=0.5)
    u = torch.randn(5, 4, dtype=torch.float64)
    targets = torch.tensor([0, 2, 1, 1, 0])
    classification, penalty = 0.0, 0.0
    for row, target in zip(u.tolist(), targets.tolist(), strict=True):
        code = [1.0 if value >= 0 else -1.0 for value in row]
        logits = [sum(w * b for w, b in zip(weights, code, strict=True)) for weights in made.classifier.weight.tolist()]
        classification += math.log(sum(math.exp(logit) for logit in logits)) - logits[target]
        penalty += sum(abs(abs(value) - 1) ** 3 for value in row)
    terms = made.loss(batch(u, targets), 0, 1)
    assert list(terms) == ["classification", "penalty"]
    assert terms["classification"].item() == pytest.approx(classification / 5, rel=1e-12)
    assert terms["penalty"].item() == pytest.approx(0.5 * penalty / 20, rel=1e-12)


def test_the_gradient_of_the_code_is_also_that_of_the_activations():
    made, targets = method(), torch.tensor([0, 2, 1])
    u = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    made.loss(batch(u, targets), 0, 1)["classification"].backward()
    b = torch.where(u >= 0, 1.0, -1.0).double().detach().requires_grad_()
    torch.nn.functional.cross_entropy(made.classifier(b), targets).backward()
    torch.testing.assert_close(u.grad, b.grad)


def test_the_gradient_of_the_classifier_agrees_with_finite_differences():
    made, targets, u = method(), torch.tensor([0, 2, 1]), torch.randn(3, 4, dtype=torch.float64)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(made.binarise(u) @ weight.T, targets)

    assert torch.autograd.gradcheck(loss, made.classifier.weight.detach().clone().requires_grad_())
    made.loss(batch(u, targets), 0, 1)["classification"].backward()
    (expected,) = torch.autograd.grad(loss(made.classifier.weight), made.classifier.weight)
    torch.testing.assert_close(made.classifier.weight.grad, expected)


def test_the_gradient_of_the_penalty_agrees_with_finite_differences():
    made, targets = method(alpha=0.7), torch.tensor([0, 2, 1])
    u = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: made.loss(batch(x, targets), 0, 1)["penalty"], u)


def test_the_accuracy_is_that_of_the_classifier_on_the_code():
    made = method(bits=2, classes=2)
    with torch.no_grad():
        made.classifier.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    u = torch.tensor([[0.3, 1.0], [-2.0, 1.0], [5.0, -1.0]], dtype=torch.float64)
    assert made.measures(batch(u, torch.tensor([0, 1, 1])))["accuracy"].item() == pytest.approx(2 / 3)


def test_multi_hot_targets_are_rejected():
    with pytest.raises(InputError, match="^greedy_hash: targets must be one class per image"):
        method().loss(batch(torch.randn(2, 4).double(), torch.ones(2, 3, dtype=torch.bool)), 0, 1)


@pytest.mark.parametrize(
    ("targets", "complaint"),
    [
        (torch.zeros(5, dtype=torch.int32), r"one class per image, a tensor of int64 \[5\], got int32 \[5\]"),
        (torch.zeros(5), r"one class per image, .* got float32 \[5\]"),
        (torch.zeros(5, 1, dtype=torch.int64), r"one class per image, .* got int64 \[5, 1\]"),
        (torch.zeros(4, dtype=torch.int64), r"one class per image, .* got int64 \[4\]"),
        (np.zeros(5, np.int64), r"one class per image, a tensor of int64 \[5\], got ndarray"),
        ([0] * 5, r"one class per image, a tensor of int64 \[5\], got list"),
        (torch.tensor([0, 1, 2, 3, 0]), "0 to 2, got 0 to 3"),
        (torch.tensor([0, 1, 2, -1, 0]), "0 to 2, got -1 to 2"),
        (torch.tensor([0, 1, 2, -100, 0]), "0 to 2, got -100 to 2"),
    ],
)
def test_targets_that_are_no_classes_are_rejected(targets, complaint):
    with pytest.raises(InputError, match=f"^greedy_hash: targets must be {complaint}$"):
        method().loss(batch(torch.randn(5, 4, dtype=torch.float64), targets), 0, 1)
