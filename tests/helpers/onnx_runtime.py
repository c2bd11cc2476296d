"""Export to ONNX, and execution of the exported model in onnxruntime."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class OnnxModel:
    """`model`, exported for example inputs by `torch.onnx.export`, as a function in onnxruntime.

    Attributes:
        nodes: the operators of the graph, such as ("Conv", "Sigmoid").
    """

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...], **options: Any):
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        file = io.BytesIO()
        torch.onnx.export(model, inputs, file, verbose=False, **options)
        self.nodes = tuple(node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node)
        self.session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        names = [argument.name for argument in self.session.get_inputs()]
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(y) for y in self.session.run(None, feed)]
