"""What the code of a build can do, for each list of architectures and each device that runs it.

The launchers decide by the architecture of the code that the device runs (`kernel_code` in launch.cuh). Here nvcc
builds the lists, and the decisions are compared with the instructions that are in the code. The tests of the kernels
run them in the emulation with every pair of a device and a code that the lists give.
"""

import pytest

from benchmarks.kernels.disassembly import compile_object, disassemble, find_disassembler, find_nvcc, intermediate_code
from setup import choose_arches
from tests.helpers.architectures import DEVICES, LISTS

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
    nvcc, tool = find_nvcc(), find_disassembler("cuobjdump")
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
