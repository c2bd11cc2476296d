"""Native kernels and plain-torch references refuse wrong arguments with the same message of one line."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hashengine as he
from hashengine import ops
from hashengine.errors import InputError
from tests.helpers.eager import gate_maps, triplet_parameters
from tests.helpers.layouts import DTYPES, feature_map

OPS = torch.ops.hashengine


def reference(module: str, name: str = "_reference") -> Callable:
    return getattr(importlib.import_module(f"hashengine.ops.{module}"), name)


REFERENCES = {
    "simam": reference("simam"),
    "simam_backward": reference("simam", "_backward_reference"),
    "simam_energy": reference("simam", "_energy_reference"),
    "simam_energy_backward": reference("simam", "_energy_backward_reference"),
    "triplet_pool": reference("triplet_pool"),
    "triplet_pool_backward": reference("triplet_pool", "_backward_reference"),
    "triplet_gate": reference("triplet_gate"),
    "triplet_gate_backward": reference("triplet_gate", "_backward_reference"),
    "triplet_attention": reference("triplet_attention"),
    "triplet_attention_inference": reference("triplet_attention", "_inference_reference"),
    "triplet_attention_backward": reference("triplet_attention", "_backward_reference"),
    "triplet_attention_update": reference("triplet_attention_update"),
    "greedy_sign": reference("greedy_sign"),
    "greedy_sign_backward": reference("greedy_sign", "_backward_reference"),
    "pack_bits": reference("pack_bits", "_pack_reference"),
    "unpack_bits": reference("pack_bits", "_unpack_reference"),
    "hamming_topk": reference("hamming_topk"),
    "hamming_range": reference("hamming_range"),
    "hamming_count": reference("hamming_count"),
}

X = feature_map("contiguous")  # [3, 4, 5, 6]
STATS = OPS.simam(X, 0.1)[1]
MAPS = gate_maps(X)
META = MAPS[0].to("meta")
POOLS = list(OPS.triplet_pool(X))
PARAMETERS = triplet_parameters(3, torch.float32, kernel_size=3)
OUTPUTS = OPS.triplet_attention(X, *PARAMETERS, True, 1e-5)
SAVED = dict(zip(("mean", "var", "pooled", "index", "response"), OUTPUTS[1:], strict=True))
U = torch.zeros(4, 8)
TWO_ZEROS = torch.zeros(2)
CODES = torch.zeros(5, 8, dtype=torch.uint8)
LABELS = torch.zeros(5, dtype=torch.int64)

ACTIVATIONS = "float64, float32, float16 or bfloat16"
AT_LEAST = "a finite number of"
INF, NAN = float("inf"), float("nan")
ONE_COLUMN = "must be [5], or multi-hot with at least 2 columns, got [5, 1]"
NO_COLUMN = ONE_COLUMN.replace("[5, 1]", "[5, 0]")
OR_ZEROS = "for classes, and add a column of zeros to multi-hot labels"
NO_NAN = "must be free of NaN, which has no sign, got at least one; check for a diverged model"
NOT_EMPTY = "x must be [N, C, H, W] with C, H and W at least 1"
ENOUGH_VALUES = "x must be [N, C, H, W] with more than one value per branch in training"
PACK = "; pack activations with hashengine.ops.pack_bits first"


def triplet(x=X, training: bool = True, **changed: Any) -> tuple:
    names = ("conv_weight", "bn_weight", "bn_bias", "running_mean", "running_var")
    return x, *(dict(zip(names, PARAMETERS, strict=True)) | changed).values(), training, 1e-5


def triplet_backward(grad_y=X, **changed: Any) -> tuple:
    return grad_y, X, *PARAMETERS[:3], *(SAVED | changed).values(), True, 1e-5


def update(mean=TWO_ZEROS, var=None, running=None, steps=2, counts=(5, 5), momentum=0.1) -> tuple:
    one = [torch.zeros(1) for _ in range(2)] if running is None else running
    tracked = [torch.zeros((), dtype=torch.int64) for _ in range(steps)]
    return mean, torch.zeros_like(mean) if var is None else var, one, one, tracked, counts, momentum


def on_cpu(name: str, expected: str, actual: str) -> str:
    return f"{name} must be {expected} on cpu, got {actual} on cpu"


ONE_VALUE = torch.zeros(1, 1, 1, 1)
KERNEL_5 = [*PARAMETERS[0][:2], torch.zeros(1, 2, 5, 5)]
EVEN = [torch.zeros(1, 2, 4, 4)] * 3
ON_META = [tensor.to("meta") for tensor in PARAMETERS[4]]
MASK = torch.zeros(1, dtype=torch.bool)

CASES = [  # (op, arguments, message without the op's name)
    ("simam", (X.int(), 0.1), f"x must be {ACTIVATIONS}, got int32"),
    ("simam", (X[0], 0.1), "x must be [N, C, H, W], got [4, 5, 6]"),
    *(
        ("simam", (X, lam), f"lam must be {AT_LEAST} 1e-18 or more, got {lam:g}")
        for lam in (0.0, -1.0, 1e-19, INF, NAN)
    ),
    ("simam", (X, 5e-324), f"lam must be {AT_LEAST} 1e-18 or more, got 4.94066e-324"),
    ("simam_energy", (X, NAN), f"lam must be {AT_LEAST} 1e-18 or more, got nan"),
    ("simam_energy_backward", (X, X, INF), f"lam must be {AT_LEAST} 1e-18 or more, got inf"),
    ("simam_backward", (X, X, STATS, 0.0), f"lam must be {AT_LEAST} 1e-18 or more, got 0"),
    ("simam_energy", (X[0], 0.1), "x must be [N, C, H, W], got [4, 5, 6]"),
    ("simam_energy_backward", (X[:1], X, 0.1), on_cpu("grad_energy", "float32 [3, 4, 5, 6]", "float32 [1, 4, 5, 6]")),
    ("simam_backward", (X[:1], X, STATS, 0.1), on_cpu("grad_y", "float32 [3, 4, 5, 6]", "float32 [1, 4, 5, 6]")),
    ("simam_backward", (X.double(), X, STATS, 0.1), on_cpu("grad_y", "float32 [3, 4, 5, 6]", "float64 [3, 4, 5, 6]")),
    ("simam_backward", (X, X, STATS[:1], 0.1), on_cpu("stats", "float32 [3, 4, 2]", "float32 [1, 4, 2]")),
    ("simam_backward", (X, X, STATS.double(), 0.1), on_cpu("stats", "float32 [3, 4, 2]", "float64 [3, 4, 2]")),
    ("triplet_pool", (X.int(),), f"x must be {ACTIVATIONS}, got int32"),
    ("triplet_pool", (X[:, :0],), f"{NOT_EMPTY}, got [3, 0, 5, 6]"),
    (
        "triplet_pool_backward",
        (POOLS[:2], POOLS[3:], X),
        "grads and indices must be 3 tensors each, one per branch, got 2 and 3",
    ),
    ("triplet_pool_backward", (POOLS[:3], POOLS[:3], X), on_cpu("indices", "int32 [3, 4, 6]", "float32 [3, 2, 4, 6]")),
    ("triplet_gate", (X, MAPS[1], MAPS[0], None), "map_cw must be [3, 1, 4, 6] for x [3, 4, 5, 6], got [3, 1, 5, 4]"),
    ("triplet_gate", (X, MAPS[0].int(), MAPS[1], None), f"map_cw must be {ACTIVATIONS}, got int32"),
    ("triplet_gate", (X, META, MAPS[1], None), "map_cw must be on x's device, cpu, got meta; move one of them"),
    ("triplet_gate_backward", (X[:1], X, *MAPS), on_cpu("grad_y", "float32 [3, 4, 5, 6]", "float32 [1, 4, 5, 6]")),
    ("triplet_attention", triplet(X[0]), "x must be [N, C, H, W], got [4, 5, 6]"),
    ("triplet_attention", triplet(X.int()), f"x must be {ACTIVATIONS}, got int32"),
    (
        "triplet_attention",
        triplet(X[:0]),
        f"{ENOUGH_VALUES}, got [0, 4, 5, 6] with 0 in branch cw; use eval mode or a larger batch",
    ),
    (
        "triplet_attention",
        triplet(ONE_VALUE),
        f"{ENOUGH_VALUES}, got [1, 1, 1, 1] with 1 in branch cw; use eval mode or a larger batch",
    ),
    (
        "triplet_attention",
        triplet(conv_weight=PARAMETERS[0][:1]),
        "conv_weight must be 2 or 3 tensors, one per branch, got 1",
    ),
    ("triplet_attention", triplet(conv_weight=PARAMETERS[1]), "conv_weight[0] must be [1, 2, K, K], got [1]"),
    ("triplet_attention", triplet(conv_weight=EVEN), "conv_weight[0] must be of odd kernel size, got 4"),
    (
        "triplet_attention",
        triplet(conv_weight=KERNEL_5),
        "conv_weight[2] must be of the kernel size of conv_weight[0], 3, got 5",
    ),
    (
        "triplet_attention",
        triplet(bn_bias=PARAMETERS[2][:2]),
        "bn_bias must be 3 tensors, as many as conv_weight, got 2",
    ),
    ("triplet_attention", triplet(bn_bias=[LABELS[:1]] * 3), f"bn_bias[0] must be {ACTIVATIONS}, got int64"),
    ("triplet_attention", triplet(running_var=[torch.zeros(2)] * 3), "running_var[0] must be [1], got [2]"),
    (
        "triplet_attention",
        triplet(running_var=ON_META),
        "running_var[0] must be on x's device, cpu, got meta; move one of them",
    ),
    ("triplet_attention_inference", (X[:, :, :0], *PARAMETERS, 1e-5), f"{NOT_EMPTY}, got [3, 4, 0, 6]"),
    (
        "triplet_attention_backward",
        triplet_backward(X[:2]),
        on_cpu("grad_y", "float32 [3, 4, 5, 6]", "float32 [2, 4, 5, 6]"),
    ),
    (
        "triplet_attention_backward",
        triplet_backward(X.double()),
        on_cpu("grad_y", "float32 [3, 4, 5, 6]", "float64 [3, 4, 5, 6]"),
    ),
    (
        "triplet_attention_backward",
        triplet_backward(index=SAVED["index"][1:]),
        on_cpu("index", "int32 [222]", "int32 [221]"),
    ),
    (
        "triplet_attention_backward",
        triplet_backward(pooled=SAVED["pooled"].double()),
        on_cpu("pooled", "float32 [444]", "float64 [444]"),
    ),
    (
        "triplet_attention_update",
        update(torch.zeros(4)),
        "mean must be float32 or float64 with 1 to 3 values, one per branch, got float32 [4]",
    ),
    ("triplet_attention_update", update(var=torch.zeros(3)), on_cpu("var", "float32 [2]", "float32 [3]")),
    (
        "triplet_attention_update",
        update(running=[torch.zeros(1)]),
        "running_mean must be a list of one entry per branch (2), got 1",
    ),
    (
        "triplet_attention_update",
        update(running=[torch.zeros(2), torch.zeros(1)]),
        on_cpu("running_mean[0]", "one value", "[2]"),
    ),
    (
        "triplet_attention_update",
        update(steps=1),
        "num_batches_tracked must be a list of one entry per branch (2), got 1",
    ),
    (
        "triplet_attention_update",
        update(counts=(5, 1)),
        "counts must be at least 2 (one value has no variance), got [5, 1]",
    ),
    *(
        (
            "triplet_attention_update",
            update(momentum=momentum),
            f"momentum must be {AT_LEAST} 0 or more, got {momentum:g}",
        )
        for momentum in (-0.1, INF, NAN)
    ),
    *(
        ("triplet_attention", (*triplet()[:-1], eps), f"eps must be a finite number above 0, got {eps:g}")
        for eps in (0.0, -1e-5, INF, NAN)
    ),
    ("triplet_attention", (*triplet(training=False)[:-1], -1.0), f"eps must be {AT_LEAST} 0 or more, got -1"),
    ("triplet_attention_inference", (X, *PARAMETERS, NAN), f"eps must be {AT_LEAST} 0 or more, got nan"),
    ("triplet_attention_backward", (*triplet_backward()[:-1], 0.0), "eps must be a finite number above 0, got 0"),
    ("greedy_sign", (LABELS, 0.1), f"u must be {ACTIVATIONS}, got int64"),
    *(("greedy_sign", (U, a), f"alpha must be {AT_LEAST} 0 or more, got {a:g}") for a in (-1.0, -1e-9, INF, NAN)),
    ("greedy_sign_backward", (U, None, U, -1.0), f"alpha must be {AT_LEAST} 0 or more, got -1"),
    ("greedy_sign_backward", (U[:2], None, U, 0.1), on_cpu("grad_b", "float32 [4, 8]", "float32 [2, 8]")),
    ("greedy_sign_backward", (None, U, U, 0.1), on_cpu("grad_penalty", "one value of float32", "float32 [4, 8]")),
    ("pack_bits", (LABELS,), f"u must be {ACTIVATIONS.replace(' or', ',')} or bool, got int64"),
    (
        "pack_bits",
        (CODES,),
        f"u must be {ACTIVATIONS.replace(' or', ',')} or bool, got uint8",
    ),  # in this library, uint8 means packed codes
    ("pack_bits", (U[:, :7],), "u must be [..., bits] with bits a multiple of 8, got [4, 7]"),
    ("unpack_bits", (U,), f"codes must be uint8, got float32{PACK}"),
    ("unpack_bits", (CODES[0, 0],), "codes must be [..., bits / 8], got a scalar"),
    ("hamming_topk", (U, CODES, 1), f"queries must be uint8, got float32{PACK}"),
    ("hamming_topk", (CODES, U, 1), f"codes must be uint8, got float32{PACK}"),
    ("hamming_topk", (CODES[0], CODES, 1), "queries must be [rows, bits / 8], got [8]"),
    ("hamming_topk", (CODES, CODES[:, :0], 1), "codes must be [rows, bits / 8], got [5, 0]"),
    ("hamming_topk", (CODES[:, :1].expand(5, 8193), CODES, 1), "queries must be of at most 65536 bits, got 65544"),
    ("hamming_topk", (CODES, CODES[:, :4], 1), "queries and codes must be of the same width, got 64 and 32 bits"),
    ("hamming_topk", (CODES, CODES.to("meta"), 1), "queries and codes must be on one device, got cpu and meta"),
    ("hamming_topk", (CODES, CODES, 0), "k must be 1 to the number of codes (5), got 0"),
    ("hamming_topk", (CODES, CODES, 6), "k must be 1 to the number of codes (5), got 6"),
    (
        "hamming_topk",
        (CODES, CODES, 1, MASK),
        "filter must be a bitmap of uint8, got bool; pack a mask with hashengine.ops.pack_filter first",
    ),
    (
        "hamming_topk",
        (CODES, CODES, 1, CODES[0]),
        "filter must be [1], or [5, 1] with one row per query, for 5 codes, got [8]",
    ),
    (
        "hamming_topk",
        (CODES, CODES, 1, CODES[:2, :1]),
        "filter must be [1], or [5, 1] with one row per query, for 5 codes, got [2, 1]",
    ),
    (
        "hamming_topk",
        (CODES, CODES, 1, CODES[0, :1].to("meta")),
        "filter must be on the device of codes, cpu, got meta; move one of them",
    ),
    ("hamming_topk", (CODES, CODES, 1, None, -1), "num_threads must be at least 1, or 0 for all, got -1"),
    ("hamming_range", (CODES, CODES, -1), "radius must be 0 to the number of bits (64), got -1"),
    ("hamming_range", (CODES, CODES, 65), "radius must be 0 to the number of bits (64), got 65"),
    ("hamming_range", (CODES, CODES, 3, None, 0), "max_results must be at least 1, got 0"),
    (
        "hamming_count",
        (CODES, CODES, None, LABELS),
        "query_labels and code_labels must be given both or neither, got one of them",
    ),
    (
        "hamming_count",
        (CODES, CODES, None, LABELS, LABELS.int()),
        on_cpu("code_labels", "int64 [5] or bool [5, L]", "int32 [5]"),
    ),
    (
        "hamming_count",
        (CODES, CODES, None, LABELS, LABELS[:4]),
        on_cpu("code_labels", "int64 [5] or bool [5, L]", "int64 [4]"),
    ),
    (
        "hamming_count",
        (CODES, CODES, None, LABELS, CODES.bool()),
        "query_labels and code_labels must be of one kind and width, got [5] and [5, 8]",
    ),
    (
        "hamming_count",
        (CODES, CODES, None, CODES[:, :1].bool(), CODES[:, :1].bool()),
        f"query_labels {ONE_COLUMN}; pass query_labels[:, 0] {OR_ZEROS}",
    ),
    (
        "hamming_count",
        (CODES, CODES, None, CODES[:, :0].bool(), CODES[:, :0].bool()),
        f"query_labels {NO_COLUMN}; pass query_labels[:, 0] {OR_ZEROS}",
    ),
    (
        "hamming_count",
        (CODES, CODES, None, LABELS, LABELS[:, None]),
        f"code_labels {ONE_COLUMN}; pass code_labels[:, 0] {OR_ZEROS}",
    ),
]


@pytest.mark.parametrize(("op", "arguments", "message"), CASES, ids=[f"{op}-{message}" for op, _, message in CASES])
def test_kernels_and_references_refuse_wrong_arguments_in_the_same_words(op, arguments, message):
    for function, error in ((getattr(OPS, op), ValueError), (REFERENCES[op], InputError)):
        with pytest.raises(error) as caught:
            function(*arguments)
        assert str(caught.value) == f"{op}: {message}"


def test_every_op_has_a_case():
    assert {op for op, _, _ in CASES} == set(REFERENCES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 7, 100_000, 131_071])  # the first and the last value, and two between
def test_nan_is_refused_because_it_has_no_sign(dtype, position):
    u = torch.zeros(1024, 128).to(dtype)
    u.view(-1)[position] = torch.nan
    for op, arguments in (("greedy_sign", (u, 0.1)), ("pack_bits", (u,))):
        for function in (getattr(OPS, op), REFERENCES[op]):
            with pytest.raises(ValueError) as caught:
                function(*arguments)
            assert str(caught.value) == f"{op}: u {NO_NAN}"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.hamming_count(CODES, CODES, labels=LABELS),
            "hamming_count: labels must be a pair (query_labels, code_labels), got Tensor",
        ),
        (lambda: ops.pack_filter(CODES), "pack_filter: mask must be bool [..., N], got uint8 [5, 8]"),
        (lambda: ops.pack_filter(torch.tensor(True)), "pack_filter: mask must be bool [..., N], got bool []"),
        (lambda: ops.pack_filter(MASK.numpy()), "pack_filter: mask must be a torch tensor of bool, got ndarray"),
    ],
)
def test_public_functions_check_their_own_arguments(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.simam(None, 1e-4),
        lambda: ops.simam_energy(None, 1e-4),
        lambda: ops.greedy_sign(None, 0.1),
        lambda: ops.triplet_pool(None),
        lambda: ops.triplet_gate(None, None, None),
        lambda: ops.pack_bits(None),
        lambda: ops.unpack_bits(None),
        lambda: he.nn.SimAM()(None),
        lambda: he.nn.GreedyHash()(None),
    ],
)
def test_none_in_place_of_a_tensor_is_refused_in_one_line(call):
    with pytest.raises(ValueError, match="must be .*, got NoneType"):
        call()


@pytest.mark.parametrize("layout", ["sparse_coo", "_mkldnn"])
@pytest.mark.parametrize("layer", [he.nn.SimAM, he.nn.TripletAttention, he.nn.GreedyHash, he.nn.PlainSimAM])
def test_an_input_that_is_not_dense_is_refused_with_its_layout(layer, layout):
    x = X.contiguous().to_sparse() if layout == "sparse_coo" else X.contiguous().to_mkldnn()
    with pytest.raises(
        ValueError, match=f" must be a dense tensor, got one of layout {layout}; call .to_dense"
    ) as caught:
        (layer(4) if layer is he.nn.PlainSimAM else layer())(x)
    assert "\n" not in str(caught.value)
