"""The greedy hash as a layer."""

from torch import Tensor, nn

from hashengine.ops import greedy_sign


class GreedyHash(nn.Module):
    """Activations [..., bits] to ``(b, penalty)``: their code of +-1 and the penalty to add to the loss.

    :func:`hashengine.ops.greedy_sign` with a fixed weight of the penalty.

    Args:
        alpha: weight of the penalty, not negative; the paper takes 0.1 for CIFAR-10 and 1 for ImageNet-100.
    """

    def __init__(self, alpha: float = 0.1):
        super().__init__()
        if not alpha >= 0:
            raise ValueError(f"GreedyHash: alpha must not be negative, got {alpha}")
        self.alpha = alpha

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return greedy_sign(u, self.alpha)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
