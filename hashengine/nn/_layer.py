"""The base class of the layers."""

from typing import NoReturn

from torch import nn

from hashengine.errors import invalid


class Layer(nn.Module):
    """A module that runs ops of hashengine."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by `torch.jit.script`, whose language lacks what the ops use."""
        actual = f"a model with {type(self).__name__}"
        advice = "use torch.jit.trace, torch.export or torch.compile"
        raise invalid("torch.jit.script", "obj", "without layers of hashengine", actual, advice)
