"""What fx nodes are called: layer names for the program, and descriptions for errors."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

__all__ = ["Names", "describe", "operator_name"]


def operator_name(node: fx.Node) -> str:
    """`aten::conv2d`, without the overload."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name)
    return str(getattr(node.target, "__name__", node.target))


def _layer(node: fx.Node) -> tuple[str, str]:
    """The qualified name and the class of the innermost module around a node; empty where unknown."""
    stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    for path, kind in reversed(list(stack.values())):
        if not path.startswith("_"):
            name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
            return re.sub(r"@\d+", "", path), name
    return "", ""


def describe(node: Any) -> str:
    """`layer 'features.3' (torch.nn.modules.activation.SiLU): operator aten.silu.default`."""
    if not isinstance(node, fx.Node):
        return str(node)
    if node.op == "output":
        return "the output"
    if node.op == "placeholder":
        return f"input '{node.name}'"
    path, kind = _layer(node)
    return f"layer '{path or node.name}'{f' ({kind})' if kind else ''}: operator {node.target}"


class Names:
    """Unique names: the layer's where the layer is the operator, `layer.operator` for functional calls in a layer."""

    def __init__(self, exported: ExportedProgram) -> None:
        signature = exported.graph_signature
        self.parameters = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.used: dict[str, int] = {}

    def of(self, node: fx.Node) -> str:
        name = self._name(node)
        count = self.used.get(name, 0)
        self.used[name] = count + 1
        return f"{name}@{count}" if count else name

    def _name(self, node: fx.Node) -> str:
        path, kind = _layer(node)
        if not path:
            return node.name
        owned = any(self.parameters.get(item.name, "").rpartition(".")[0] == path for item in node.all_input_nodes)
        if owned or (kind.startswith("torch.nn.modules.") and "container" not in kind):
            return path
        return f"{path}.{operator_name(node).rpartition('::')[2].rstrip('_')}"
