"""Ops in a forked process, in which the threads of the parent do not exist.

The calls run in a new process, so that no forked process inherits the threads and locks of the test runner. All sizes
are so large that the parent uses several threads.
"""

import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

SECONDS = 120  # a call takes less than a second; without the remedy, the child waits without end

SCRIPT = """
import multiprocessing, sys
import numpy as np
import torch
import hashengine as he

codes = np.random.default_rng(0).integers(0, 256, (200_000, 8), dtype=np.uint8)
index = he.HammingIndex(64)
index.add(codes)
x = torch.randn(32, 64, 28, 28)
simam, triplet = he.nn.SimAM(), he.nn.TripletAttention().eval()
calls = {
    "search": lambda: index.search(codes[:256], 10),
    "search with num_threads": lambda: index.search(codes[:256], 10, num_threads=2),
    "range_search": lambda: index.range_search(codes[:256], 12),
    "count": lambda: index.count(codes[:256]),
    "simam": lambda: simam(x),
    "triplet": lambda: triplet(x),
    "pack_bits": lambda: he.ops.pack_bits(torch.randn(1 << 16, 64)),
}

def child(name):
    calls[name]()
    assert torch.get_num_threads() == 1

if __name__ == "__main__":
    torch.set_num_threads(2)
    for call in calls.values():
        call()  # starts the threads of the parent
    context, failed = multiprocessing.get_context("fork"), []
    for name in calls:
        process = context.Process(target=child, args=(name,))
        process.start()
        process.join(int(sys.argv[1]))
        if process.exitcode != 0:
            failed.append(name)
            process.kill()
            process.join()
            break
    pool = context.Pool(2)
    expected = index.search(codes[:256], 10)[1]
    found = pool.apply_async(index.search, (codes[:256], 10)).get(int(sys.argv[1]))[1] if not failed else expected
    assert (found == expected).all()
    assert torch.get_num_threads() == 2
    print("failed:", failed)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork is safe on Linux only")
def test_searches_and_ops_work_in_a_forked_process(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = [sys.executable, "-W", "ignore", str(script), str(SECONDS)]
    done = subprocess.run(run, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout == "failed: []\n", done.stdout + done.stderr


def test_importing_hashengine_does_not_import_torch_for_the_fork():
    script = "import hashengine, os, sys\npid = os.fork()\nif pid == 0: os._exit('torch' in sys.modules)\n"
    script += "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr
