"""`recalibrate` sets running statistics to the average over the batches and changes nothing else."""

from functools import partial

import pytest
import torch
from torch import nn

import hashengine as he
from tests.helpers.networks import images, small_resnet, small_vgg


def test_recalibrate_averages_the_batches():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3, momentum=0.3), nn.BatchNorm2d(3))
    model[2].eval()
    model[1].running_mean.fill_(9)
    batches = [images(4, seed=seed) + seed for seed in range(3)]
    assert he.nn.recalibrate(model, [batches[0], (batches[1], None), [batches[2]]]) == 3
    for name, buffer in (("mean", model[1].running_mean), ("var", model[1].running_var)):
        expected = torch.stack([getattr(batch, name)((0, 2, 3)) for batch in batches]).mean(0)
        torch.testing.assert_close(buffer, expected)
    torch.testing.assert_close(model[2].running_mean, torch.zeros(3), atol=1e-5, rtol=0)  # its input is normalised
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert [model[1].momentum, model[2].momentum] == [0.3, 0.1]


@pytest.mark.parametrize("build", [small_resnet, partial(small_vgg, normed=True)])
def test_recalibrate_corrects_a_network_with_simam(build):
    """After `recalibrate`, training and eval mode differ only in the divisor of the variance, n or n - 1."""
    model = build()
    x = torch.cat([images(32, seed=seed) for seed in range(8)])
    model(x)
    he.nn.attach(model, "simam")
    expected = model.train()(x)
    before = (model.eval()(x) - expected).abs().max()
    he.nn.recalibrate(model, [x])
    after = (model(x) - expected).abs().max()
    assert after < 0.02 * before and not model.training


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], he.InputError, "recalibrate: batches must be at least one batch, got none"),
        ([images(), "cat.jpeg"], he.InputError, "recalibrate: batches must be tensors, .*, got str at position 1"),
        ([images(), images()[:, :1]], RuntimeError, "expected input"),
        (
            [images(), images()[:0]],
            he.InputError,
            r"batches must be of at least one .*, got \[0, 3, 16, 16\] at",
        ),
        ([(images()[:0], None)], he.InputError, "batches must be of at least one input, got .*; leave out empty"),
        (
            images(),
            he.InputError,
            r"batches must be an iterable .*, got a tensor \[2, 3, 16, 16\]; pass \[batches\]",
        ),
        (images()[None], he.InputError, "batches must be an iterable of batches, such as a list, got a tensor"),
    ],
)
def test_a_failed_recalibration_leaves_the_old_statistics(batches, error, message):
    model = small_resnet().train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        he.nn.recalibrate(model, batches)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(module.training for module in model.modules()) and model.layer1[0].bn1.momentum == 0.1


class OneOfTwo(nn.Module):
    """Two BatchNorms, of which eval mode runs only the first."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.auxiliary = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x) + self.auxiliary(x) if self.training else self.main(x)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_statistics_of_norms_that_no_batch_reaches_stay(is_compiled):
    model = OneOfTwo()
    for norm in (model.main, model.auxiliary):
        norm.running_mean.fill_(3)
        norm.num_batches_tracked.fill_(100)
    expected = {key: tensor.clone() for key, tensor in model.auxiliary.state_dict().items()}
    if is_compiled:
        torch.compile(model.eval(), backend="eager")(images())
    he.nn.recalibrate(torch.compile(model, backend="eager") if is_compiled else model, [images()])
    torch.testing.assert_close(dict(model.auxiliary.state_dict()), expected, rtol=0, atol=0)
    assert model.main.num_batches_tracked == 1 and (model.main.running_mean < 2).all()


def test_auxiliary_classifiers_of_googlenet_keep_their_statistics():
    googlenet = pytest.importorskip("torchvision").models.googlenet(init_weights=False, aux_logits=True)
    norm = googlenet.aux1.conv.bn
    norm.running_mean.fill_(3)
    he.nn.recalibrate(googlenet, [images(64)])
    assert (norm.running_mean == 3).all() and googlenet.conv1.bn.num_batches_tracked == 1


def test_norms_without_statistics_are_skipped():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[0].running_mean = model[0].running_var = None
    assert he.nn.recalibrate(model, [images()]) == 1 and model[1].num_batches_tracked == 1
    with pytest.raises(he.InputError, match="recalibrate: model must be .* BatchNorm .*, got a Sequential with none"):
        he.nn.recalibrate(model[:1], [images()])


def test_recalibrate_needs_norms():
    with pytest.raises(he.InputError, match="recalibrate: model must be .* BatchNorm .*, got a Linear with none"):
        he.nn.recalibrate(nn.Linear(2, 2), [])


def test_arguments_of_another_type_are_refused():
    with pytest.raises(he.InputError, match="recalibrate: model must be an nn.Module, got int"):
        he.nn.recalibrate(3, [])
    with pytest.raises(he.InputError, match="recalibrate: batches must be an iterable of batches, got int"):
        he.nn.recalibrate(nn.Linear(2, 2), 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_batches_that_spoil_the_statistics_are_refused(value):
    model = nn.Sequential(nn.BatchNorm2d(3))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with pytest.raises(he.InputError, match="^recalibrate: batches must be ones whose statistics are finite"):
        he.nn.recalibrate(model, [torch.full((2, 3, 4, 4), value)])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: nn.Sequential(nn.LazyConv2d(2, 3), nn.LazyBatchNorm2d()), "that is not initialised yet"),
        (lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)).to("meta"), "on the meta device"),
    ],
)
def test_a_network_without_values_is_refused(build, problem):
    with pytest.raises(he.InputError, match=f"^recalibrate: model must be .* buffer '1.running_mean' {problem}$"):
        he.nn.recalibrate(build(), [torch.rand(2, 3, 8, 8)])
