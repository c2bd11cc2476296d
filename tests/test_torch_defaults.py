"""The default dtype and the default device of torch change neither results nor their dtypes and devices."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import hashengine as he
from hashengine import HammingIndex, doctor, evaluation, images, metrics, ops
from hashengine._torch_defaults import torch_defaults
from hashengine.index import HammingKNN, rerank_vectors
from hashengine.methods import Batch, View, create
from hashengine.models import HashNet, HashNetConfig
from hashengine.ops.triplet_attention import triplet_attention_inference
from hashengine.training import FitConfig, fit
from tests.helpers.eager import gate_maps, triplet_parameters
from tests.helpers.layouts import feature_map
from tests.helpers.networks import images as network_images
from tests.helpers.networks import small_resnet, small_vgg
from tests.helpers.official import OfficialSimAM, OfficialTriplet
from tests.helpers.tiny_images import make_images, make_model, write_noise

GENERATOR = np.random.default_rng(0)
CODES = GENERATOR.integers(0, 256, (50, 8), np.uint8)
QUERIES = GENERATOR.integers(0, 256, (5, 8), np.uint8)
VECTORS = GENERATOR.standard_normal((50, 64)).astype(np.float32)
LABELS = (np.arange(5) % 3, np.arange(50) % 3)
MULTI_HOT = (np.eye(5, 4, dtype=bool), np.arange(50)[:, None] % 4 == np.arange(4))
X = feature_map("contiguous")
U = feature_map("contiguous").flatten()[:352].view(11, 32)
PACKED = torch.from_numpy(CODES)
PARAMETERS = triplet_parameters(3, torch.float32)
MAPS = gate_maps(X)
BATCH = network_images()


@contextmanager
def defaults(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


# "meta" stands for "cuda": a tensor that is made without a device then meets one on another device.
DEFAULTS: dict[str, dict[str, Any]] = {
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "meta": {"device": "meta"},
}


def filled(devices: Any = "cpu", **options: Any) -> HammingIndex:
    index = HammingIndex(64, devices, **options)
    index.add(CODES)
    return index


def searches(index: HammingIndex) -> list[Any]:
    mask = np.arange(len(index)) % 2 == 0
    results = [*index.search(QUERIES, 7), *index.search(torch.from_numpy(QUERIES), 3, filter=mask)]
    results += [*index.range_search(QUERIES, 30), *index.range_search(QUERIES, 40, max_results=4)]
    rows = np.arange(len(index))
    for labels in ((LABELS[0], rows % 3), (MULTI_HOT[0], rows[:, None] % 4 == np.arange(4))):
        results += index.count(QUERIES, labels=labels)
    results.append(index.count(QUERIES))
    results += [index.codes, index.ids, index.reconstruct(index.ids[:2])]
    return [*results, *index.rerank(VECTORS[:5], index.search(QUERIES, 7)[1])]


def index_with_changes(tmp_path: Path, devices: Any) -> list[Any]:
    index = filled(devices)
    results = searches(index)
    index.remove(np.array([3, 8]))
    index.update(np.array([0, 9]), CODES[:2])
    index.add(CODES[:7])
    results += searches(index)
    index.compact()
    index.save(tmp_path / "index")
    for options in ({}, {"mmap": True}, {"streamed": True}, {"device": ("cpu", "cpu")}):
        results += searches(HammingIndex.load(tmp_path / "index", **options))
    return results + searches(index.to(["cpu", "cpu", "cpu"])) + searches(index.to(streamed=True))


def index_with_ids(tmp_path: Path) -> list[Any]:
    results = []
    for devices in ("cpu", ("cpu", "cpu")):
        index = HammingIndex(64, devices)
        index.add(CODES, np.arange(50) + 1000)
        index.add(CODES[:0], np.arange(0))
        results += searches(index)
        index.save(tmp_path / "index")
        results += searches(HammingIndex.load(tmp_path / "index", device=devices))
    return results


def index_of_several_blocks(tmp_path: Path) -> list[Any]:
    codes = np.random.default_rng(1).integers(0, 256, (20_000, 8), np.uint8)
    index = HammingIndex(64, ["cpu", "cpu"])
    index.add(torch.from_numpy(codes))
    return [
        *index.search(QUERIES, 20),
        *index.range_search(QUERIES, 20),
        index.reconstruct(torch.tensor([19_999, 0], device="cpu")),
    ]


def other_searches(tmp_path: Path) -> list[Any]:
    ids = filled().search(QUERIES, 9)[1]
    results = [
        *rerank_vectors(VECTORS[:5], VECTORS, ids),
        *rerank_vectors(torch.from_numpy(VECTORS[:5]).double(), VECTORS, ids),
    ]
    knn = HammingKNN()
    return [*results, *knn(CODES, 4), *knn(VECTORS[:5], 3, VECTORS), *knn(QUERIES, 3, filled())]


def figures(tmp_path: Path) -> list[Any]:
    results: list[Any] = []
    for labels in (LABELS, MULTI_HOT):
        for database in (CODES, filled()):
            counts = metrics.distance_counts(QUERIES, database, labels=labels)
            results += [counts.items, counts.relevant, *vars(counts.precision_recall_curve()).values()]
            means = [counts.mean_average_precision(), counts.mean_average_precision(at=10, denominator="relevant")]
            means += [counts.precision_at(5), counts.recall_at(5)]
            results += [
                value for mean in means for value in vars(mean).values() if not isinstance(value, (str, type(None)))
            ]
            results.append(counts.precision_within_radius(25))
    return results


def all_ops(tmp_path: Path) -> list[Any]:
    results: list[Any] = []
    for function in (ops.simam, ops.simam_energy, ops.triplet_pool, lambda x: ops.triplet_gate(x, *MAPS)):
        x = X.clone().requires_grad_()
        outputs = function(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results += [*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), x)]
    for mode in (True, False):
        results += ops.triplet_attention(X, *PARAMETERS, mode)
    results.append(triplet_attention_inference(X, *PARAMETERS))
    u = U.clone().requires_grad_()
    b, penalty = ops.greedy_sign(u, 0.1)
    results += [b, penalty, *torch.autograd.grad(b.square().sum() + penalty, u)]
    results += [ops.pack_bits(U), ops.unpack_bits(PACKED), ops.pack_filter(PACKED > 7)]
    results += [*ops.hamming_topk(PACKED[:3], PACKED, 4), *ops.hamming_range(PACKED[:3], PACKED, 30)]
    results += ops.hamming_count(PACKED[:3], PACKED, labels=(PACKED[:3, 0].long(), PACKED[:, 0].long()))
    return results


def plain_formulas(tmp_path: Path) -> list[Any]:
    """The references, of which those of differentiable ops run under a transform of `torch.func`."""
    results = [torch.func.vjp(function, X)[0] for function in (ops.simam, ops.simam_energy, ops.triplet_pool)]
    results = [*results[:2], *results[2], *torch.func.vjp(lambda u: ops.greedy_sign(u, 0.1), U)[0]]
    results += torch.func.vjp(lambda x: ops.triplet_attention(x, *PARAMETERS, True), X)[0]
    labels = (PACKED[:3, 0].long(), PACKED[:, 0].long())
    results += reference("hamming_topk")(PACKED[:3], PACKED, 4)
    results += reference("hamming_range")(PACKED[:3], PACKED, 30)
    results += reference("hamming_count")(PACKED[:3], PACKED, None, *labels)
    return [*results, reference("pack_bits", "_pack_reference")(U), reference("pack_bits", "_unpack_reference")(PACKED)]


def reference(module: str, name: str = "_reference") -> Callable[..., Any]:
    return getattr(importlib.import_module(f"hashengine.ops.{module}"), name)


def attached(build: Callable[[], nn.Module], tmp_path: Path) -> list[Any]:
    """A network that was built with other defaults gets layers of its own dtype and device."""
    results: list[Any] = []
    for layer in ("simam", "triplet"):
        with torch_defaults():
            model = build().eval()
        he.nn.attach(model, layer)
        state = model.state_dict()
        results += [tensor for name, tensor in state.items() if "conv.conv.weight" not in name]  # random weights
        assert all(
            tensor.dtype in (torch.float32, torch.int64) and tensor.device.type == "cpu" for tensor in state.values()
        )
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.arange(tensor.numel(), dtype=tensor.dtype, device="cpu").view_as(tensor) % 5 / 10 + 0.1
                )
        results.append(model(BATCH))
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            results += [he.nn.recalibrate(model, [BATCH]), *model.buffers()]
        he.nn.detach(model)
        results.append(model(BATCH))
    return results


def fused(tmp_path: Path) -> list[Any]:
    with torch_defaults():
        torch.manual_seed(0)
        model = nn.Sequential(OfficialTriplet(), OfficialSimAM(), OfficialTriplet(naming="long"))
    report = he.nn.fuse(model)
    assert report.left == {} and len(report.fused) == 3
    return [model(X), *model.buffers()]


def layers(tmp_path: Path) -> list[Any]:
    return [he.nn.SimAM()(X), he.nn.PlainSimAM()(X), *he.nn.GreedyHash()(U)]


def closed_forms_and_losses(tmp_path: Path) -> list[Any]:
    features = torch.from_numpy(VECTORS)
    itq = create("itq")
    head = itq.fit(features, 16)
    u = features[:8, :16].clone().requires_grad_()
    batch = Batch(u, features[:8], torch.arange(8, device="cpu") % 2, View(u.flip(0), features[:8]))
    terms = create("cibhash").loss(batch, 0, 1)
    return [
        head.weight,
        head.bias,
        *itq.figures().values(),
        *terms.values(),
        *torch.autograd.grad(sum(terms.values()), u),
    ]


def read_images(tmp_path: Path) -> list[Any]:
    image = Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
    return [images.image_tensor(image, 16, channels) for channels in (1, 3)]


def loaded_model(tmp_path: Path) -> list[Any]:
    """A saved network in float32 on the CPU, its activations and codes."""
    with torch_defaults():
        make_model(tmp_path / "model")
    model = HashNet.from_pretrained(tmp_path / "model")
    pixels = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (4, 1, 8, 8), np.uint8))
    output = model(pixels)
    return [*model.state_dict().values(), model.mean, model.std, output.activations, model.encode(pixels)]


def trained_models(tmp_path: Path) -> list[Any]:
    write_noise(tmp_path / "images", {"a": 12, "b": 12})
    results: list[Any] = []
    for method in ("greedy_hash", "itq", "cibhash"):
        config = {"bits": 8, "epochs": 1, "batch_size": 8, "widths": (8,), "flip": True, "device": "cpu"}
        run = fit(FitConfig(images=tmp_path / "images", output=tmp_path / method, method=method, **config))
        results += [*run.model().state_dict().values(), *run.record["epochs"][0].values()]
    return results


def evaluated_images(tmp_path: Path) -> list[Any]:
    with torch_defaults():
        make_model(tmp_path / "model")
        make_images(tmp_path / "database", 4)
        make_images(tmp_path / "query", 2, seed=1)
    for side in ("database", "query"):
        evaluation.encode_folder(tmp_path / side, tmp_path / "model", device="cpu").save(tmp_path / f"{side}-codes")
    evaluation.index_codes(tmp_path / "database-codes", tmp_path / "index")
    found = evaluation.evaluate_folders(tmp_path / "index", tmp_path / "query-codes")
    return [found.mean_average_precision.expected]


TOURS: dict[str, Callable[[Path], list[Any]]] = {
    "an index": partial(index_with_changes, devices="cpu"),
    "an index of two parts": partial(index_with_changes, devices=("cpu", "cpu")),
    "an index with ids": index_with_ids,
    "an index of several blocks": index_of_several_blocks,
    "rerank_vectors and HammingKNN": other_searches,
    "metrics": figures,
    "ops": all_ops,
    "plain formulas": plain_formulas,
    "layers": layers,
    "attach to a resnet": partial(attached, small_resnet),
    "attach to a vgg": partial(attached, partial(small_vgg, True)),
    "attach to a vgg without norms": partial(attached, small_vgg),
    "fuse": fused,
    "methods": closed_forms_and_losses,
    "images": read_images,
    "a saved model": loaded_model,
    "training": trained_models,
    "evaluation": evaluated_images,
}


def described(results: list[Any]) -> list[Any]:
    """Each result with its type, dtype and device."""
    kinds = []
    for result in results:
        if isinstance(result, Tensor):
            kinds.append((result.dtype, result.device.type))
        else:
            kinds.append((type(result), getattr(result, "dtype", None)))
    return kinds


@pytest.mark.parametrize("tour", TOURS)
@pytest.mark.parametrize("changed", DEFAULTS)
def test_results_do_not_depend_on_the_defaults_of_torch(changed, tour, tmp_path):
    run = TOURS[tour]
    (tmp_path / "expected").mkdir()
    (tmp_path / "found").mkdir()
    expected = run(tmp_path / "expected")
    with defaults(**DEFAULTS[changed]):
        found = run(tmp_path / "found")
    assert described(found) == described(expected)
    for actual, value in zip(found, expected, strict=True):
        if isinstance(value, Tensor):
            torch.testing.assert_close(actual.detach(), value.detach(), rtol=0, atol=0, equal_nan=True)
        else:
            np.testing.assert_array_equal(actual, value)


@pytest.mark.parametrize("changed", DEFAULTS)
def test_doctor_finds_no_fault_that_the_defaults_of_torch_cause(changed):
    with defaults(**DEFAULTS[changed]):
        assert [check.found for check in doctor.examine() if check.status == "broken"] == []


@pytest.mark.parametrize("changed", DEFAULTS)
def test_the_defaults_of_torch_return_after_a_computation_without_them(changed):
    with defaults(**DEFAULTS[changed]):
        before = torch.empty(0)
        with torch_defaults():
            inside = torch.empty(0)
        after = torch.empty(0)
    assert (inside.dtype, inside.device.type) == (torch.float32, "cpu")
    assert (after.dtype, after.device) == (before.dtype, before.device)


def test_other_threads_do_not_see_the_block():
    inside, leave = threading.Event(), threading.Event()

    def block() -> torch.dtype:
        with torch_defaults():
            inside.set()
            assert leave.wait(60)
            return torch.empty(0).dtype

    with defaults(torch.float64), ThreadPoolExecutor() as pool:
        run = pool.submit(block)
        assert inside.wait(60)
        assert torch.get_default_dtype() == torch.empty(0).dtype == nn.Linear(1, 1).weight.dtype == torch.float64
        leave.set()
        assert run.result() == torch.float32


def test_a_training_run_does_not_change_the_default_dtype_of_the_process(tmp_path, monkeypatch):
    write_noise(tmp_path / "images", {"a": 12, "b": 12})
    seen: set[torch.dtype] = set()
    zero_grad = torch.optim.AdamW.zero_grad

    def look(optimizer: torch.optim.AdamW) -> None:
        seen.add(torch.get_default_dtype())
        zero_grad(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", look)
    options = {"bits": 8, "epochs": 1, "batch_size": 8, "widths": (8,), "device": "cpu"}
    with defaults(torch.float64):
        fit(FitConfig(images=tmp_path / "images", output=tmp_path / "model", **options))
    assert seen == {torch.float64}


@pytest.mark.parametrize("changed", DEFAULTS)
def test_functions_that_make_tensors_have_the_dtypes_of_float32_as_the_default(changed):
    def made() -> list[Tensor]:
        numbers = [torch.tensor(0.1), torch.tensor([[1, 0.1]]), torch.full((2,), 0.1), torch.arange(0.0, 1.0, 0.3)]
        others = [torch.tensor(1), torch.arange(3), torch.full((2,), True), torch.tensor(np.ones(2)), torch.eye(2)]
        typed = [torch.zeros(2, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64), torch.linspace(0, 1, 7)]
        return [*numbers, *others, *typed, torch.zeros(2), torch.as_tensor(0.1)]

    expected = made()
    with defaults(**DEFAULTS[changed]), torch_defaults():
        found = made()
    assert described(found) == described(expected)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_nested_blocks_and_errors_in_them_restore_the_default_dtype():
    with defaults(torch.float64):
        with torch_defaults():
            with pytest.raises(ValueError, match="inner"), torch_defaults():
                raise ValueError("inner")
            assert torch.empty(0).dtype == torch.float32
        assert torch.empty(0).dtype == torch.float64


@pytest.mark.parametrize("changed", DEFAULTS)
def test_a_new_network_has_the_default_dtype_and_device_like_every_module_of_torch(changed):
    with defaults(**DEFAULTS[changed]):
        model = HashNet(HashNetConfig(bits=8, classes=("a", "b"), widths=(4,)))
        expected = torch.empty(0)
    for tensor in (*model.parameters(), model.mean, model.std):
        assert (tensor.dtype, tensor.device) == (expected.dtype, expected.device)
