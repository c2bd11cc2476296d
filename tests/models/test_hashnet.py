"""HashNet: activations, codes, saved models, and errors."""

import io
import json
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.utils import prune

from hashengine import ops
from hashengine.errors import InputError
from hashengine.models import HashNet, HashNetConfig, checkpoint
from hashengine.nn import SimAM, TripletAttention

CLASSES = ("ant", "bee", "cat")


def network(seed: int = 0, **options) -> HashNet:
    torch.manual_seed(seed)
    options = {"bits": 16, "classes": CLASSES, "channels": 1, "image_size": 8, "widths": (8, 16)} | options
    return HashNet(HashNetConfig(**options)).eval()


def random_images(count: int, channels: int = 1, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("attention", ["none", "simam", "triplet"])
@pytest.mark.parametrize(("channels", "size", "stem_stride"), [(1, 8, 1), (3, 32, 2)])
def test_forward_returns_activations_and_features(attention, channels, size, stem_stride):
    model = network(attention=attention, channels=channels, image_size=size, stem_stride=stem_stride).train()
    activations, features = model(random_images(5, channels, size))
    assert activations.shape == (5, 16) and features.shape == (5, 16)
    torch.testing.assert_close(activations, model.hash_layer(features))
    activations.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_each_attention_layer_is_where_its_authors_put_it():
    branches = {name: [*network(attention=name).backbone[1].branch] for name in ("none", "simam", "triplet")}
    plain = [type(layer) for layer in branches["none"]]
    assert plain[-2:] == [nn.Conv2d, nn.BatchNorm2d]
    assert [type(layer) for layer in branches["simam"]] == [*plain[:-1], SimAM, nn.BatchNorm2d]
    assert [type(layer) for layer in branches["triplet"]] == [*plain, TripletAttention]


def test_pixels_are_normalised_with_the_configured_statistics():
    images = random_images(4)
    plain, scaled = network(mean=(0.0,), std=(1.0,)), network(mean=(0.3,), std=(0.2,))
    expected = plain.hash_layer(plain.backbone((images / 255 - 0.3) / 0.2))
    torch.testing.assert_close(scaled(images).activations, expected)


def test_a_model_that_is_saved_while_it_is_loaded_is_loaded_again(tmp_path, monkeypatch):
    first, second = network(0), network(1, widths=(4,))
    first.save_pretrained(tmp_path)
    check = HashNetConfig.checked

    def save_afterwards(*arguments, **values):
        monkeypatch.setattr(HashNetConfig, "checked", check)
        second.save_pretrained(tmp_path)
        return check(*arguments, **values)

    monkeypatch.setattr(HashNetConfig, "checked", save_afterwards)
    loaded = HashNet.from_pretrained(tmp_path)
    assert loaded.config == second.config
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("fails", [False, True])
def test_encode_restores_the_mode_of_each_module(fails):
    model = network().train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()
    modes = [module.training for module in model.modules()]
    if fails:
        nn.init.constant_(model.hash_layer.weight, float("nan"))
        with pytest.raises(InputError, match="activations must be finite"):
            model.encode(random_images(2))
    else:
        model.encode(random_images(2))
    assert norms and [module.training for module in model.modules()] == modes


def test_encode_packs_the_signs_in_batches_and_leaves_the_model_unchanged():
    model, images = network().train(), random_images(10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    codes = model.encode(images, batch_size=4)
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert codes.dtype == torch.uint8 and codes.shape == (10, 2)
    with torch.no_grad():
        assert torch.equal(
            codes, torch.cat([ops.pack_bits(model.eval()(part).activations) for part in images.split(4)])
        )
    assert model.encode(images[:0]).shape == (0, 2)


def test_encode_refuses_activations_that_are_not_finite():
    model = network()
    nn.init.constant_(model.hash_layer.bias, float("nan"))
    with pytest.raises(InputError, match="activations must be finite, got NaN or infinity for images 0 to 1"):
        model.encode(random_images(2))


@pytest.mark.parametrize(
    "images",
    [random_images(2).float(), random_images(2, size=9), random_images(2)[0]],
    ids=["float32", "9 x 9 pixels", "one image without a batch axis"],
)
def test_images_of_another_type_or_shape_are_refused(images):
    for entry in (network(), network().encode):
        with pytest.raises(InputError, match=r"images must be uint8 \[N, 1, 8, 8\].*, got"):
            entry(images)


def test_images_that_are_not_a_tensor_are_refused():
    with pytest.raises(InputError, match=r"HashNet.encode: images must be a torch tensor, got list"):
        network().encode([1, 2])


def test_preprocess_makes_the_input_of_the_network_from_a_larger_photo():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8))
    for channels in (1, 3):
        model = network(channels=channels, image_size=16)
        pixels = model.preprocess(photo)
        assert pixels.shape == (channels, 16, 16) and pixels.dtype == torch.uint8
        assert model.encode(pixels[None]).shape == (1, 2)


def test_a_saved_model_gives_the_same_codes(tmp_path):
    model, images = network(mean=(0.1,), std=(0.7,)), random_images(50)
    network(seed=5, bits=24).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded = HashNet.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_save_leaves_the_old_model_intact(tmp_path, monkeypatch):
    model = network()
    model.save_pretrained(tmp_path)

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        network(seed=5, bits=24).save_pretrained(tmp_path)
    assert torch.equal(HashNet.from_pretrained(tmp_path).encode(random_images(9)), model.encode(random_images(9)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: .*JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "config.json: "),
        (lambda folder: edit_config(folder, version=2), "config.json: version must be 1, got 2"),
        (lambda folder: edit_config(folder, format="x"), "config.json: format must be .*got 'x'"),
        (
            lambda folder: edit_config(folder, bits=24),
            "model.safetensors: the file must be the weights saved together with",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"foreign"), "model.safetensors: .*damaged"),
    ],
)
def test_a_foreign_or_damaged_folder_raises_an_error_of_one_line(tmp_path, damage, complaint):
    network().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=complaint) as caught:
        HashNet.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_detected(tmp_path):
    network().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="model.safetensors: .*damaged"):
            HashNet.from_pretrained(tmp_path)


def test_weights_that_cannot_be_read_are_not_called_damaged(tmp_path, monkeypatch):
    network().save_pretrained(tmp_path)

    def denied(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "safe_open", denied)
    with pytest.raises(PermissionError, match="Permission denied"):
        HashNet.from_pretrained(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path):
    model = network()
    model.save_pretrained(tmp_path)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    weights["hash_layer.bias"] = torch.zeros(3)
    config = json.dumps(json.loads((tmp_path / "config.json").read_text()), separators=(",", ":"))
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"config": config})
    with pytest.raises(
        InputError, match="weights must be those of the network in config.json, got .*hash_layer.bias"
    ) as caught:
        HashNet.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("network_options", "method"),
    [
        ({"widths": (4096, 4096)}, None),
        ({"bits": 65_536}, None),
        ({"widths": (8,) * 64}, None),
        ({}, checkpoint.MethodState("cibhash", {"temperature": 0.3, "bottleneck_weight": 0.1, "hidden": 65_536}, {})),
    ],
)
def test_weights_are_compared_with_the_network_before_its_memory_is_allocated(
    tmp_path, monkeypatch, network_options, method
):
    model = network()
    config = HashNetConfig(**model.config.model_dump() | network_options)
    checkpoint.save(tmp_path, checkpoint.Model(config, model.state_dict(), method))
    initialise = nn.init.kaiming_uniform_

    def without_values(tensor, *arguments, **options):
        assert tensor.is_meta
        return initialise(tensor, *arguments, **options)

    monkeypatch.setattr(nn.init, "kaiming_uniform_", without_values)
    with pytest.raises(InputError, match="weights must be those of the network in config.json, got ") as caught:
        HashNet.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_network_with_more_stages_than_an_image_can_be_halved_is_refused():
    with pytest.raises(InputError, match="^HashNetConfig: widths must be of at most 64 items, got "):
        HashNetConfig(classes=CLASSES, widths=(8,) * 65)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"bits": 12}, "^HashNetConfig: bits must be a multiple of 8, got 12"),
        ({"bits": 0}, "bits must be greater than 0, got 0"),
        ({"classes": ("one",)}, "classes must be of at least 2 items"),
        ({"classes": ("a", "a")}, "classes must be distinct names"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"attention": "big"}, "attention must be .*got 'big'"),
        ({"std": (1.0, 2.0)}, "std must be one number or one for each"),
        ({"depth": 3}, "'depth' must be a known option"),
    ],
)
def test_a_mistake_in_a_config_raises_an_error_of_one_line(options, complaint):
    with pytest.raises(InputError, match=complaint) as caught:
        HashNetConfig(**{"classes": CLASSES} | options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        (lambda dim, bits: nn.Linear(dim, 8), r"\[3, 8\]"),
        (lambda dim, bits: nn.Linear(dim, 24), r"\[3, 24\]"),
        (lambda dim, bits: nn.Sequential(nn.Linear(dim, bits), FirstRow()), r"\[1, 16\]"),
    ],
)
def test_a_head_that_gives_another_shape_is_refused_by_encode(head, shape):
    config = HashNetConfig(classes=("a", "b"), bits=16, image_size=8, widths=(4,))
    network = HashNet(config, head=head)
    with pytest.raises(InputError, match=f"^HashNet.encode: the output of the hash layer must be .*, got {shape}"):
        network.encode(torch.zeros(3, config.channels, 8, 8, dtype=torch.uint8))


class FirstRow(nn.Module):
    def forward(self, x):
        return x[:1]


def test_arguments_of_another_kind_and_the_device_meta_are_refused(tmp_path):
    config = HashNetConfig(classes=("a", "b"), bits=16, image_size=8, widths=(4,))
    with pytest.raises(InputError, match="^HashNet: config must be a HashNetConfig, got NoneType$"):
        HashNet(None)
    with pytest.raises(InputError, match="^HashNet: head must be a function that makes the hash layer, got int$"):
        HashNet(config, head=5)
    network, images = HashNet(config), torch.zeros(1, config.channels, 8, 8, dtype=torch.uint8)
    with pytest.raises(InputError, match="^HashNet.encode: images must be on a device with memory"):
        network.encode(images.to("meta"))
    network.to("meta")
    for call in (lambda: network.encode(images), lambda: network.save_pretrained(tmp_path)):
        with pytest.raises(InputError, match="the network must be on a device with memory, got one on the device"):
            call()


def assigned(target: nn.Module, source: nn.Module) -> nn.Module:
    target.load_state_dict(source.state_dict(), assign=True)
    return target


def loaded(target: nn.Module, source: nn.Module) -> nn.Module:
    target = target.to_empty(device="cpu")
    target.load_state_dict(source.state_dict())
    return target


@pytest.mark.parametrize("load", [assigned, loaded])
@pytest.mark.parametrize("wrap", [lambda model: model, nn.Sequential], ids=["itself", "inside another module"])
def test_a_network_that_was_made_on_meta_and_loaded_gives_the_same_codes(load, wrap):
    source = network(mean=(0.3,), std=(0.2,))
    with torch.device("meta"):
        target = wrap(network(mean=(0.3,), std=(0.2,)))
    load(target, wrap(source))
    copy = target if isinstance(target, HashNet) else target[0]
    images = random_images(3)
    torch.testing.assert_close(copy.eval()(images), source(images))
    assert torch.equal(copy.encode(images), source.encode(images))


def test_parameters_on_meta_are_contiguous_as_fully_shard_requires():
    with torch.device("meta"):
        assert all(parameter.is_contiguous() for parameter in network().parameters())


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_network_can_be_pickled_with_every_protocol(protocol):
    model, file = network(), io.BytesIO()
    torch.save(model, file, pickle_protocol=protocol)
    file.seek(0)
    for copy in (pickle.loads(pickle.dumps(model, protocol)), torch.load(file, weights_only=False)):
        assert torch.equal(copy.encode(random_images(3)), model.encode(random_images(3)))


@pytest.mark.parametrize("attention", ["none", "simam", "triplet"])
def test_a_trace_is_the_same_with_and_without_gradients(attention):
    model, images = network(attention=attention), random_images(3)
    traced = torch.jit.trace(model, images)  # checks the trace without gradients
    torch.testing.assert_close(traced(images)[0], model(images).activations)


def test_conversions_that_change_nothing_keep_mean_and_std():
    model = network()
    with torch.inference_mode():
        model.to("cpu")
    model.share_memory()
    assert not model.mean.is_inference() and model.mean.is_shared()
    model = network()
    address = model.mean.data_ptr()
    assert model.to("cpu").mean.data_ptr() == address


def test_to_empty_keeps_mean_and_std():
    model = network(mean=(0.3,), std=(0.2,))
    model.to_empty(device="cpu")
    assert model.mean.item() == pytest.approx(0.3) and model.std.item() == pytest.approx(0.2)


def test_weights_of_another_dtype_can_be_assigned():
    model, source = network(), network(1).double()
    model.load_state_dict(source.state_dict(), assign=True)
    torch.testing.assert_close(model(random_images(2)), source(random_images(2)))


def test_a_network_in_fsdp1_can_be_converted():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
        assert wrapped.double().to("cpu")(random_images(2)).activations.dtype == torch.float64
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("image", ["a.png", None, np.zeros((8, 8), np.uint8)])
def test_preprocess_takes_only_images_of_pil(image):
    with pytest.raises(InputError, match="^preprocess: image must be a PIL image, got .*; read_image opens a file"):
        network().preprocess(image)


class WithItsOwnValues(HashNet):
    """A network whose constructor reads a weight, and that has one more."""

    def __init__(self, config, head=nn.Linear):
        super().__init__(config, head)
        self.scale = nn.Parameter(torch.ones(1))
        self.first = float(next(self.backbone.parameters()).flatten()[0])


def test_a_subclass_may_read_values_and_have_more_weights(tmp_path):
    config = network().config
    WithItsOwnValues(config).save_pretrained(tmp_path)
    assert isinstance(WithItsOwnValues.from_pretrained(tmp_path).first, float)
    with pytest.raises(InputError, match="scale"):
        HashNet.from_pretrained(tmp_path)


def test_a_head_that_is_no_module_is_refused():
    with pytest.raises(InputError, match="^HashNet: head must be a function that returns an nn.Module, got NoneType"):
        HashNet(network().config, lambda features, bits: None)


class Centred(nn.Linear):
    def forward(self, x):
        return super().forward(x - 0.3)


@pytest.mark.parametrize(
    "head", [Centred, lambda f, b: nn.Linear(f, b, bias=False), lambda f, b: nn.Sequential(nn.Linear(f, b))]
)
def test_a_hash_layer_that_cannot_be_loaded_is_not_saved(tmp_path, head):
    model = HashNet(network().config, head)
    with pytest.raises(InputError, match="^HashNet.save_pretrained: the hash layer must be Linear.*; save its state"):
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_network_that_cannot_be_loaded_is_not_saved(tmp_path):
    def mask(model):
        prune.l1_unstructured(model.backbone[0][0], "weight", amount=0.5)

    def replace(model):
        model.backbone[0][2] = nn.GELU()

    def compile_backbone(model):
        model.backbone = torch.compile(model.backbone, backend="eager")

    for change, message in (
        (mask, "the weights of the backbone must be those of a new one, got another '0.0.weight.*prune.remove"),
        (replace, "the backbone must be .*ReLU.*, got .*GELU"),
        (compile_backbone, "the backbone must be .*, got OptimizedModule; save its state_dict"),
    ):
        model = network()
        change(model)
        with pytest.raises(InputError, match=f"^HashNet.save_pretrained: {message}"):
            model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    model = network()
    mask(model)
    prune.remove(model.backbone[0][0], "weight")
    model.save_pretrained(tmp_path)
    loaded = HashNet.from_pretrained(tmp_path)
    assert torch.equal(loaded.backbone[0][0].weight, model.backbone[0][0].weight)


def test_mean_and_std_are_exact_in_every_dtype():
    model = network(mean=(0.4914,), std=(0.2023,))
    assert model.bfloat16().float().mean.item() == torch.tensor(0.4914).item()
    assert model.double().std.item() == 0.2023


def test_loading_does_not_depend_on_the_modes_and_the_random_state_of_the_caller(tmp_path):
    network().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    with torch.inference_mode():
        model = HashNet.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_a_lazy_head_is_refused_in_one_line():
    with pytest.raises(
        InputError, match="^HashNet: head must be .* got a lazy module such as nn.LazyLinear; "
    ) as caught:
        HashNet(network().config, lambda dim, bits: nn.Sequential(nn.LazyLinear(bits)))
    assert "\n" not in str(caught.value)


def test_tied_weights_are_saved_and_loaded(tmp_path):
    class Tied(HashNet):
        def __init__(self, config, head=nn.Linear):
            super().__init__(config, head)
            self.other = nn.Linear(self.hash_layer.in_features, config.bits)
            self.other.weight = self.hash_layer.weight

    model = Tied(network().config)
    model.save_pretrained(tmp_path)
    loaded = Tied.from_pretrained(tmp_path)
    assert loaded.other.weight is loaded.hash_layer.weight
    assert torch.equal(loaded.hash_layer.weight, model.hash_layer.weight)


def test_codes_can_be_changed_in_place():
    model = network().eval()
    images = torch.zeros(2, model.config.channels, model.config.image_size, model.config.image_size, dtype=torch.uint8)
    codes = model.encode(images)
    codes ^= 255
    assert torch.equal(codes, ~model.encode(images))
