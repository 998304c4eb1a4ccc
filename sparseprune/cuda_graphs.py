"""A module's calls replayed as CUDA graphs: one launch for a whole network, where the shapes are those seen before."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

__all__ = ["GraphReplay", "capture_graph"]

MOST_GRAPHS = 8  # each holds its own memory

Capture = Callable[[Callable[[], Any]], tuple[Callable[[], Any], Any]]


def capture_graph(run: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """Captures what `run` does, after warming up on a stream of its own.

    Returns:
        What replays it, and the outputs, which each replay writes anew.

    Raises:
        RuntimeError: It does what cannot be captured, such as wait for the device.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs


class GraphReplay(nn.Module):
    """`module`, replayed: inputs are copied in, outputs cloned out, so a caller owns what it gets.

    A graph is captured for each of the first eight combinations of shapes, dtypes and strides; other calls, keyword
    arguments, and inputs beside the device run `module` itself. To be called from one stream at a time.

    Args:
        module: For evaluation; what it computes depends on its inputs only.
        device: Where it is.
        capture: What captures a call; `capture_graph` where left out.

    Attributes:
        failure: Why capturing failed, where it did; `module` runs itself then.
    """

    def __init__(self, module: nn.Module, device: torch.device, capture: Capture | None = None) -> None:
        super().__init__()
        self.module, self.device, self.failure = module, device, ""
        self._capture = capture or capture_graph
        self._graphs: dict[Any, tuple[list[Tensor], Callable[[], Any], Any]] = {}
        self._lock = threading.Lock()
        super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if kwargs or self.failure or not tensors or any(x.device != self.device for x in tensors):
            return self.module(*args, **kwargs)
        key = (repr(spec), *((x.shape, x.dtype, x.stride()) if isinstance(x, Tensor) else repr(x) for x in leaves))
        with self._lock:
            found = self._graphs.get(key)
            if found is None:
                if len(self._graphs) >= MOST_GRAPHS:
                    return self.module(*args)
                found = self._captured(leaves, spec)
                if found is None:
                    return self.module(*args)
                self._graphs[key] = found
            static, replay, outputs = found
            for mine, given in zip(static, tensors, strict=True):
                mine.copy_(given)
            replay()
            return tree_map(lambda y: y.clone() if isinstance(y, Tensor) else y, outputs)

    def _captured(self, leaves: list[Any], spec: Any) -> tuple[list[Tensor], Callable[[], Any], Any] | None:
        own = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args = tree_unflatten(own, spec)
        self.module(*args)  # measures layers that never saw such an input: not possible while capturing
        try:
            replay, outputs = self._capture(lambda: self.module(*args))
        except RuntimeError as error:  # CudaError is one
            self.failure = str(error).strip().split("\n")[0]
            return None
        return [leaf for leaf in own if isinstance(leaf, Tensor)], replay, outputs
