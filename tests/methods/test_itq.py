"""ITQ: its error never rises and is below that of random rotations; its rotation solves the Procrustes problem."""

import numpy as np
import pytest
import torch
from torch import Tensor

from hashengine import methods
from hashengine.errors import InputError
from hashengine.methods.itq import ItqMethod, _procrustes


def features(count: int = 400, dim: int = 24, seed: int = 0) -> Tensor:
    """Correlated features in clusters, far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(5, dim, generator=generator)
    mixing = torch.randn(dim, dim, generator=generator)
    noise = torch.randn(count, dim, generator=generator) @ mixing
    return centres[torch.arange(count) % 5] + 0.3 * noise + 10


def fitted(x: Tensor, bits: int = 16, **options) -> tuple[ItqMethod, torch.nn.Linear]:
    method = methods.create("itq", **options)
    return method, method.fit(x, bits)


@pytest.mark.parametrize("seed", range(5))
def test_the_error_never_rises_and_ends_lower(seed):
    method, _ = fitted(features(seed=seed), rotation_seed=seed)
    assert len(method.errors) == 51  # before the first of 50 iterations, and after each
    steps = np.diff(method.errors)
    assert (steps <= 1e-12).all() and method.errors[-1] < method.errors[0]


def test_the_error_is_below_those_of_20_random_rotations():
    x = features()
    method, _ = fitted(x)
    random = [fitted(x, iterations=0, rotation_seed=seed)[0].errors[0] for seed in range(20)]
    assert method.errors[-1] < 0.98 * min(random)


def test_the_reported_error_is_that_of_the_activations():
    x = features().double()
    method, head = fitted(x)
    u = head(x).detach()
    assert float((u.sign() - u).square().mean()) == pytest.approx(method.errors[-1], rel=1e-9)


def test_the_head_is_an_orthonormal_projection_of_centred_features():
    x = features().double()
    _, head = fitted(x)
    torch.testing.assert_close(head.weight @ head.weight.T, torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(head(x).mean(0), torch.zeros(16, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_head_spans_the_leading_principal_components():
    x = features().double()
    _, head = fitted(x, bits=8)
    _, _, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    leading = directions[:8]
    torch.testing.assert_close(head.weight.T @ head.weight, leading.T @ leading)


def test_the_rotation_solves_the_procrustes_problem():
    """None of 200 other rotations, from close to the solution to random, has a smaller error."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(100, 6, generator=generator, dtype=torch.float64)
    b = torch.where(torch.randn(100, 6, generator=generator) >= 0, 1.0, -1.0).double()
    rotation = _procrustes(v, b)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(6, dtype=torch.float64))
    best = float((b - v @ rotation).square().sum())
    for scale in (1e-3, 1e-1, 1.0, 10.0):
        for _ in range(50):
            skew = torch.randn(6, 6, generator=generator, dtype=torch.float64) * scale
            other = rotation @ torch.linalg.matrix_exp(skew - skew.T)
            assert best <= float((b - v @ other).square().sum()) + 1e-9


def test_the_same_seed_gives_the_same_head_and_the_global_random_state_is_unchanged():
    state = torch.get_rng_state()
    first, again, other = (fitted(features(), rotation_seed=seed)[1].weight for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_head_has_the_dtype_of_the_features():
    assert fitted(features().half())[1].weight.dtype == torch.float16


def test_too_many_bits_and_features_that_are_not_finite_are_rejected():
    with pytest.raises(InputError, match="^itq: bits must be 1 to 24 .*got 32"):
        fitted(features(), bits=32)
    with pytest.raises(
        InputError, match="^itq: bits must be 1 to 9 .the rank of 10 centred features of dimension 24., got 16"
    ):
        fitted(features(count=10), bits=16)
    with pytest.raises(InputError, match="^itq: features must be finite"):
        fitted(torch.full((30, 24), float("nan")))
    with pytest.raises(InputError, match="^itq: features must be finite, with finite sums of squares, got larger ones"):
        fitted(features().double() * 1e200)


@pytest.mark.parametrize("bits", [0, -1, True, 3.0, "3", None])
def test_bits_that_are_no_positive_integer_are_rejected(bits):
    with pytest.raises(InputError, match="^itq: bits must be (an integer from )?1 to 24 .*got .*$"):
        methods.create("itq").fit(features(), bits)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda x: x[0], r"\[N, dim\] with at least 2 rows, got \[24\]"),
        (lambda x: x[None], r"\[N, dim\] with at least 2 rows, got \[1, "),
        (lambda x: x[:0], r"\[N, dim\] with at least 2 rows, got \[0, 24\]"),
        (lambda x: x[:1], r"\[N, dim\] with at least 2 rows, got \[1, 24\]"),
        (lambda x: x[:, :0], r"\[N, dim\] with at least 2 rows, got \["),
        (lambda x: x.long(), "float64, .* or bfloat16, got int64"),
        (lambda x: x + 0j, "float64, .* or bfloat16, got complex64"),
        (lambda x: x.tolist(), "a torch tensor, got list"),
        (lambda x: x.numpy(), "a torch tensor, got ndarray"),
        (lambda x: x.to("meta"), "a tensor with values, got one on the device 'meta'"),
        (lambda x: x.to_sparse(), "a dense tensor, got one of layout sparse_coo"),
    ],
)
def test_features_of_another_kind_or_shape_are_rejected(change, complaint):
    with pytest.raises(InputError, match=f"^itq: features must be {complaint}"):
        methods.create("itq").fit(change(features().float()), 8)


def test_itq_has_no_loss():
    with pytest.raises(NotImplementedError, match="closed form"):
        methods.create("itq").loss(None, 0, 1)
