"""Greedy hash as a layer."""

from torch import Tensor

from hashengine._validation import check_number
from hashengine.nn._layer import Layer
from hashengine.ops import greedy_sign


class GreedyHash(Layer):
    """`hashengine.ops.greedy_sign` with a fixed weight of the penalty.

    Maps activations [..., bits] to `(b, penalty)`: the signs, +1 or -1, and the penalty to add to the loss.

    Args:
        alpha: weight of the penalty, a finite number of 0 or more; Su et al., NeurIPS 2018, use 0.1 for CIFAR-10 and 1
            for ImageNet-100.

    Raises:
        InputError: `alpha` is out of range or not a number.
    """

    def __init__(self, alpha: float = 0.1):
        super().__init__()
        self.alpha = check_number("GreedyHash", "alpha", alpha, least=0)

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Map `u` [..., bits] to `b`, with the shape and dtype of `u`, and the scalar penalty."""
        return greedy_sign(u, self.alpha)

    def extra_repr(self) -> str:
        """The arguments that `repr` shows."""
        return f"alpha={self.alpha}"
