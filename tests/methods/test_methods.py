"""The interface that every hashing method implements, and the registry of methods."""

import sys

import pytest
import torch
from torch import nn

from hashengine import methods
from hashengine.errors import InputError
from hashengine.methods.base import Batch, HashingMethod, View

BITS, DIM, CLASSES, COUNT = 16, 24, 3, 12

every_method = pytest.mark.parametrize("name", methods.own_names())
trained_methods = pytest.mark.parametrize(
    "name", [name for name in methods.own_names() if not methods.find(name).has_closed_form]
)


def make(name: str) -> methods.HashingMethod:
    torch.manual_seed(0)
    method = methods.create(name)
    method.add_parameters(BITS, CLASSES)
    return method


def view(head: nn.Module, seed: int = 0) -> View:
    features = torch.randn(COUNT, DIM, generator=torch.Generator().manual_seed(seed))
    return View(head(features), features)


def batch_for(method: methods.HashingMethod, head: nn.Module) -> Batch:
    first = view(head)
    second = view(head, seed=1) if method.views == 2 else None
    return Batch(*first, torch.arange(COUNT) % CLASSES, second)


def test_the_methods_are_found_and_base_is_not_a_method():
    assert {"greedy_hash", "itq", "cibhash"} <= set(methods.names()) and "base" not in methods.names()
    assert methods.DEFAULT in methods.names()


@every_method
def test_a_method_is_named_after_its_file_and_documents_its_options(name):
    method = methods.find(name)
    assert method.name == name
    assert all(field.description for field in method.Options.model_fields.values())
    documentation = sys.modules[method.__module__].__doc__
    assert all(f"- {item}" in documentation for item in ("Head:", "Defaults"))


@every_method
def test_the_head_maps_features_to_activations(name):
    assert methods.create(name).head(DIM, BITS)(torch.randn(COUNT, DIM)).shape == (COUNT, BITS)


@every_method
def test_binarise_gives_the_sign_with_a_positive_gradient(name):
    u = torch.tensor([[0.0, -0.0, 1e-30, -1e-30, 2.0, -2.0, 1e4, -1e4]], requires_grad=True)
    b = methods.create(name).binarise(u)
    assert torch.equal(b.detach(), torch.where(u >= 0, 1.0, -1.0)) and b.dtype == u.dtype
    b.sum().backward()
    # Not for 1e4 and -1e4: there cibhash's gradient, that of a sigmoid, rounds to 0.
    assert u.grad is not None and bool((u.grad[:, :6] > 0).all())


@trained_methods
def test_the_terms_of_the_loss_have_gradients_for_the_head_and_the_method(name):
    method, head = make(name), methods.create(name).head(DIM, BITS)
    terms = method.loss(batch_for(method, head), step=0, epoch=1)
    assert terms and all(term.dim() == 0 and torch.isfinite(term) for term in terms.values())
    sum(terms.values()).backward()
    assert all(p.grad is not None for module in (method, head) for p in module.parameters())


@trained_methods
def test_the_sign_can_be_transformed(name):
    method, u = methods.create(name), torch.tensor([[0.5, -0.25, 2.0], [-1.0, 3.0, -0.5]])
    inputs = u.clone().requires_grad_()
    method.binarise(inputs).sum().backward()
    assert torch.allclose(torch.func.grad(lambda u: method.binarise(u).sum())(u), inputs.grad)
    assert torch.allclose(torch.func.jvp(method.binarise, (u,), (torch.ones_like(u),))[1], inputs.grad)
    assert torch.equal(torch.func.vmap(method.binarise)(u[:, None])[:, 0], method.binarise(u))


@trained_methods
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_does_not_overflow_in_half_precision(name, dtype):
    generator = torch.Generator().manual_seed(0)
    u, other = (200 * torch.randn(COUNT, 128, generator=generator).to(dtype) for _ in range(2))
    method = methods.create(name)
    method.add_parameters(128, CLASSES)
    method = method.to(dtype)
    u.requires_grad_()
    batch = Batch(u, u.detach(), torch.arange(COUNT) % CLASSES, View(other, other) if method.views == 2 else None)
    terms = method.loss(batch, 0, 1)
    assert all(torch.isfinite(term) for term in terms.values())
    sum(terms.values()).backward()
    assert bool(torch.isfinite(u.grad).all())


@trained_methods
@pytest.mark.parametrize(
    ("activations", "complaint"),
    [
        (torch.ones(COUNT, BITS, dtype=torch.int64), "float64, float32, float16 or bfloat16, got int64"),
        (torch.ones(COUNT), "[N, bits] with N and bits at least 1, got [12]"),
        (torch.ones(COUNT, BITS, 2), "[N, bits] with N and bits at least 1, got [12, 16, 2]"),
        (torch.ones(0, BITS), "[N, bits] with N and bits at least 1, got [0, 16]"),
        ([1.0], "a torch tensor, got list"),
    ],
)
def test_activations_that_have_no_loss_are_refused_in_one_line(name, activations, complaint):
    batch = Batch(activations, activations, torch.zeros(len(activations)).long(), View(activations, activations))
    with pytest.raises(InputError) as caught:
        make(name).loss(batch, 0, 1)
    assert str(caught.value) == f"{name}: activations must be {complaint}"


@every_method
def test_a_state_dict_restores_the_parameters_of_a_method(name):
    method, other = make(name), methods.create(name)
    torch.manual_seed(1)
    other.add_parameters(BITS, CLASSES)
    other.load_state_dict(method.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), other.parameters(), strict=True))


@every_method
def test_creating_a_method_does_not_change_the_random_state(name):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    methods.create(name)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("lattice", {}, "^methods.create: method must be one of cibhash, .*got 'lattice'"),
        ("greedy_hash", {"alpha": -1}, "^greedy_hash: alpha must be greater than or equal to 0, got -1"),
        ("cibhash", {"temperature": 0}, "^cibhash: temperature must be greater than 0, got 0"),
        ("itq", {"iterations": -1}, "^itq: iterations must be greater than or equal to 0, got -1"),
        ("itq", {"alpha": 1}, "^itq: 'alpha' must be a known option"),
    ],
)
def test_a_wrong_method_or_option_gives_an_error_of_one_line(name, options, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        methods.create(name, **options)
    assert "\n" not in str(caught.value)


def test_a_subclass_that_inherits_a_name_does_not_replace_the_method():
    registered = methods.find("greedy_hash")
    type("Mine", (registered,), {})
    type("Nameless", (HashingMethod,), {})
    assert methods.find("greedy_hash") is registered


@pytest.fixture
def registry(monkeypatch):
    """A registry that has its former entries again after the test."""
    monkeypatch.setattr(HashingMethod, "registry", dict(HashingMethod.registry))


def test_a_method_outside_the_package_is_found_by_its_name(registry):
    class Lattice(HashingMethod):
        name = "lattice"

    assert methods.find("lattice") is Lattice and "lattice" in methods.names()
    assert methods.create("lattice").options == methods.Config()


def test_a_method_outside_the_package_cannot_take_the_name_of_one_in_it(registry):
    itq = methods.find("itq")
    with pytest.raises(InputError, match="Mine: name must be none of a method of hashengine, got 'itq'$"):
        type("Mine", (HashingMethod,), {"name": "itq"})
    assert methods.find("itq") is itq


def test_a_method_of_an_installed_package_is_found_by_its_name(registry, tmp_path, monkeypatch):
    (tmp_path / "crystals.py").write_text(
        "from hashengine.methods import HashingMethod\nclass Lattice(HashingMethod):\n    name = 'crystal'\n"
    )
    (tmp_path / "crystals-1.dist-info").mkdir()
    (tmp_path / "crystals-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: crystals\nVersion: 1\n")
    (tmp_path / "crystals-1.dist-info" / "entry_points.txt").write_text(
        "[hashengine.methods]\ncrystal = crystals:Lattice\nlost = no_such_module:Lost\nother = crystals:Lattice\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert {"crystal", "lost"} <= set(methods.names())
    assert methods.find("crystal").__module__ == "crystals"
    with pytest.raises(InputError, match="^f: method 'lost' must be defined by no_such_module:Lost, got No module "):
        methods.find("lost", "f")
    with pytest.raises(InputError, match="^f: method must be one of .*, got 'other'; import the module "):
        methods.find("other", "f")
    monkeypatch.delitem(sys.modules, "crystals")
