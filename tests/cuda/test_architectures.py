"""What the code of a build can do, for each list of architectures and each device that runs it.

The launchers decide by the architecture of the code that the device runs (`kernel_code` in launch.cuh). Here nvcc
builds the lists, and the decisions are compared with the instructions that are in the code. The searches and layers run
in the emulation with every pair of a device and a code that the lists give.
"""

import pytest
import torch

from benchmarks.kernels.disassembly import compile_object, disassemble, find_cuobjdump, find_nvcc, intermediate_code
from setup import choose_arches
from tests.cuda.test_hamming_topk import make_search, topk
from tests.cuda.test_simam import Case as SimamCase
from tests.cuda.test_simam import check as check_simam
from tests.emulation.harness import load_emulation
from tests.helpers.hamming_levels import assert_same, nearest
from tests.helpers.triplet_cases import AttentionCase

DEVICES = [80, 86, 89, 90, 100, 103, 120, 121]
# For each list, the code that each device runs; 0: none.
LISTS = {
    "8.0+PTX": dict.fromkeys(DEVICES, 80),
    "8.0+PTX 9.0a": {80: 80, 86: 80, 89: 80, 90: 90, 100: 80, 103: 80, 120: 80, 121: 80},
    "8.0 8.6 8.9 9.0a 10.0 12.0+PTX": {80: 80, 86: 86, 89: 89, 90: 90, 100: 100, 103: 100, 120: 120, 121: 120},
}
FIRST_WITH_CLUSTERS = 90  # kClusterArchitecture in launch.cuh

# The instructions of the machine code, and those of PTX, by which a feature is recognised.
CLUSTER, WAIT = ("UCGABAR", "barrier.cluster"), ("ACQBULK", "griddepcontrol.wait")

SOURCE = """
#include "cuda/common/cluster.cuh"
#include "cuda/common/launch.cuh"

__global__ void kernel(int* out) {
  hashengine::wait_for_previous_kernel();
  hashengine::cluster_sync();
  out[blockIdx.x] = hashengine::cluster_blocks();
}
static_assert(hashengine::kClusterArchitecture == 90);
"""


def code_for(device: int, binaries: list[str], intermediates: list[str]) -> int:
    """The architecture of the code that CUDA runs on a device: a binary of the same major version if there is one.

    A binary for "90a" runs on 9.0 only. PTX of an older architecture is compiled for the device.
    """

    def number(name: str) -> int:
        return int(name.rstrip("a"))

    fitting = [name for name in binaries if number(name) // 10 == device // 10 and number(name) <= device]
    fitting = [name for name in fitting if not name.endswith("a") or number(name) == device]
    fitting = fitting or [name for name in intermediates if not name.endswith("a") and number(name) <= device]
    return max(map(number, fitting), default=0)


@pytest.mark.parametrize("arch_list", LISTS)
def test_code_has_clusters_and_waits_exactly_from_the_architecture_that_the_launchers_ask_for(arch_list, tmp_path):
    nvcc, tool = find_nvcc(), find_cuobjdump()
    for missing in (nvcc, tool):
        if isinstance(missing, str):
            pytest.skip(missing)
    if max(int(name.removesuffix("+PTX").rstrip("a").replace(".", "")) for name in arch_list.split()) > max(
        nvcc.arches
    ):
        pytest.skip(f"nvcc {nvcc.release} does not support all of {arch_list}")
    (tmp_path / "kernel.cu").write_text(SOURCE)
    compile_object(tmp_path / "kernel.cu", arch_list, tmp_path / "kernel.o")
    codes, ptx = disassemble(tmp_path / "kernel.o"), intermediate_code(tmp_path / "kernel.o")
    for code in codes:
        is_new = int(code.architecture.rstrip("a")) >= FIRST_WITH_CLUSTERS
        assert (code.has(CLUSTER[0]), code.has(WAIT[0])) == (is_new, is_new)
    for architecture, text in ptx.items():
        is_new = int(architecture.rstrip("a")) >= FIRST_WITH_CLUSTERS
        assert (CLUSTER[1] in text, WAIT[1] in text) == (is_new, is_new)
    found = {device: code_for(device, [code.architecture for code in codes], list(ptx)) for device in DEVICES}
    assert found == LISTS[arch_list]


def test_the_last_list_is_the_default_one():
    nvcc = find_nvcc()
    if isinstance(nvcc, str):
        pytest.skip(nvcc)
    assert choose_arches({}, nvcc, []) == list(LISTS)[-1] or max(nvcc.arches) != 121


PAIRS = sorted({(device, code) for devices in LISTS.values() for device, code in devices.items()})


@pytest.mark.parametrize(("device", "code"), PAIRS)
def test_every_device_gives_right_answers_with_the_code_that_it_runs(device, code):
    emulation = load_emulation()
    with emulation.device(code=code):
        for queries in (1, 5, 67):
            search = make_search("random", 9001, 64, queries)
            assert_same(topk(emulation, search, 50, device)[0], nearest(search.queries, search.codes, 50))
        check_simam(emulation, SimamCase((1, 8, 3000), torch.bfloat16, channels_last=True), capability=device)
        case = AttentionCase(torch.randn(2, 66, 9, 10, generator=torch.Generator().manual_seed(0)).bfloat16())
        y, exact = case.inference(emulation, capability=device), case.formula(torch.float64, False)["y"]
        assert (y.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()
