"""triplet_attention_update against nn.BatchNorm2d."""

import pytest
import torch

from hashengine.ops.triplet_attention_update import triplet_attention_update
from tests.helpers.layouts import feature_map


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_buffers_change_as_in_batch_norm(momentum, dtype):
    norms = [torch.nn.BatchNorm2d(1, momentum=momentum).to(dtype) for _ in range(3)]
    copies = [torch.nn.BatchNorm2d(1, momentum=momentum).to(dtype) for _ in range(3)]
    for step in range(3):
        x = feature_map("contiguous", dtype, (3, 1, 4, 5), seed=step)
        for norm in copies:
            norm(x)
        mean, var = x.float().mean().expand(3).clone(), x.float().var(correction=0).expand(3).clone()
        lists = [list(column) for column in zip(*((n.running_mean, n.running_var) for n in norms), strict=True)]
        version = norms[0].running_mean._version
        triplet_attention_update(mean, var, *lists, [n.num_batches_tracked for n in norms], [60] * 3, momentum)
        assert norms[0].running_mean._version > version  # autograd detects changes by the version
    for norm, copy in zip(norms, copies, strict=True):
        torch.testing.assert_close(norm.state_dict(), copy.state_dict())
