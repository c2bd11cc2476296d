"""pack_bits' and unpack_bits' kernels in the CUDA emulator, compared with numpy."""

import numpy as np
import pytest
import torch

from tests.emulation.harness import SCHEDULES, Emulation, array, load_emulation, sparse_array

FLOATING = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def emulation() -> Emulation:
    return load_emulation()


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("code_bytes", [0, 1, 3, 255, 300, 2049])
@pytest.mark.parametrize("dtype", [*FLOATING, torch.bool])
def test_packing_and_unpacking(emulation, dtype, code_bytes, offset):
    values = torch.randn(8 * code_bytes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = array(8 * code_bytes, dtype, offset).copy_(values >= 0 if dtype == torch.bool else values)
    if dtype != torch.bool and code_bytes:
        u[:6] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), -torch.finfo(dtype).tiny])
    expected = np.packbits((u if dtype == torch.bool else u >= 0).numpy())
    for schedule in SCHEDULES:
        codes = array(code_bytes, torch.uint8, offset)
        emulation.call("pack_bits", u, codes, code_bytes, dtype, schedule=schedule)
        np.testing.assert_array_equal(codes.numpy(), expected)
        bits = array(8 * code_bytes, torch.uint8, offset)
        emulation.call("unpack_bits", codes, bits, code_bytes, schedule=schedule)
        np.testing.assert_array_equal(bits.numpy(), np.unpackbits(expected))


def test_every_byte_unpacks(emulation):
    codes = torch.arange(256, dtype=torch.uint8)
    bits = array(2048, torch.uint8)
    emulation.call("unpack_bits", codes, bits, 256)
    np.testing.assert_array_equal(bits.numpy(), np.unpackbits(codes.numpy()))


# --- more than 2^31 elements: only the last block runs, and only the pages that it accesses exist --------------------


def test_more_than_two_to_the_31_elements(emulation):
    block, code_bytes = 1024, 2**31 + 2**20
    u, bits, codes = (sparse_array(numel, torch.uint8) for numel in (8 * code_bytes, 8 * code_bytes, code_bytes))
    tail = torch.randint(0, 2, (8 * block,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    u[-8 * block :] = tail
    last = code_bytes // block - 1
    emulation.call("pack_bits", u, codes, code_bytes, torch.bool, first_block=last)
    np.testing.assert_array_equal(codes[-block:].numpy(), np.packbits(tail.numpy()))
    assert not codes[:block].any() and not codes[-2 * block : -block].any()
    emulation.call("unpack_bits", codes, bits, code_bytes, first_block=last)
    assert torch.equal(bits[-8 * block :], tail)
    assert not bits[: 8 * block].any() and not bits[-16 * block : -8 * block].any()
