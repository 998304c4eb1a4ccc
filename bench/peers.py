"""Other engines' ways of running a dense model, where they are installed: ONNX Runtime and OpenVINO (the extra
`sparseprune[peers]`), MNN.

MNN's package asks for unrelated services; what runs networks installs alone: `pip install --no-deps MNN`.
"""

from __future__ import annotations

import importlib.util
import io
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["INFORMATION", "PEERS", "installed", "peer"]

# Dense float32: what a converted model is measured against.
PEERS = ("onnxruntime", "openvino", "mnn")
# Another precision, or sparse too: worth knowing, but no baseline.
INFORMATION = ("openvino_bf16", "onnxruntime_int8", "mnn_sparse")

_MODULES = {"onnxruntime": ("onnx", "onnxruntime"), "openvino": ("onnx", "openvino"), "mnn": ("onnx", "MNN", "_tools")}


def installed(name: str) -> bool:
    """Whether this machine has the engine of that name."""
    return all(importlib.util.find_spec(module) is not None for module in _MODULES[name.split("_")[0]])


def peer(name: str, dense: nn.Module, args: tuple[Tensor, ...], threads: int) -> Callable[[], Any]:
    """A call of the dense model in that engine, on inputs that are where it wants them; it returns tensors.

    Raises:
        ModuleNotFoundError: The engine is not installed.
        Exception: Whatever the engine raises for a model that it does not know.
    """
    if not installed(name):
        raise ModuleNotFoundError(f"{name.split('_')[0]} is not installed (pip install 'sparseprune[peers]')")
    build = {"onnxruntime": _onnxruntime, "openvino": _openvino, "mnn": _mnn}[name.split("_")[0]]
    with tempfile.TemporaryDirectory() as folder, _quiet():
        return build(name, _export(dense, args, folder), [np.ascontiguousarray(x.numpy()) for x in args], threads)


def _export(dense: nn.Module, args: tuple[Tensor, ...], folder: str) -> str:
    path = os.path.join(folder, "model.onnx")
    with torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(dense, tuple(x.clone() for x in args), path, dynamo=False)
    return path


def _onnxruntime(name: str, path: str, inputs: list[Any], threads: int) -> Callable[[], Any]:
    import onnxruntime

    if name.endswith("int8"):
        path = _quantized(path, inputs)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {item.name: x for item, x in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: [torch.from_numpy(y) for y in session.run(None, feed)]


def _quantized(path: str, inputs: list[Any]) -> str:
    """Static int8, calibrated on the example: the speed is right, the accuracy would need real images."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Examples(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, names: list[str]) -> None:
            self.items: Iterator[Any] = iter([dict(zip(names, inputs, strict=True))])

        def get_next(self) -> Any:
            return next(self.items, None)

    import onnx

    prepared, result = path + ".prepared", path + ".int8"
    quant_pre_process(path, prepared)
    names = [item.name for item in onnx.load(prepared).graph.input]
    quantization.quantize_static(prepared, result, Examples(names), per_channel=True)
    return result


def _openvino(name: str, path: str, inputs: list[Any], threads: int) -> Callable[[], Any]:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if name.endswith("bf16") else "f32",
    }
    request = openvino.Core().compile_model(openvino.convert_model(path), "CPU", settings).create_infer_request()

    def run() -> Any:
        found = request.infer(inputs, share_inputs=True, share_outputs=True)
        return [torch.from_numpy(np.asarray(found[i])) for i in range(len(found))]

    return run


def _mnn(name: str, path: str, inputs: list[Any], threads: int) -> Callable[[], Any]:
    import _tools  # not MNN.tools: that installs a logging service when it is imported
    import MNN

    model = path + ".mnn"
    sparse = ["--detectSparseSpeedUp"] if name.endswith("sparse") else []
    _tools.mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", path, "--MNNModel", model, "--bizCode", "x", *sparse])
    runtime = MNN.nn.create_runtime_manager(({"backend": "CPU", "precision": "high", "numThread": threads},))
    network = MNN.nn.load_module_from_file(model, [], [], runtime_manager=runtime)
    variables = [MNN.expr.const(x, list(x.shape), MNN.expr.NCHW) for x in inputs]
    return lambda: [torch.from_numpy(np.array(y.read())) for y in network.forward(variables)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the converters print, natively too."""
    sys.stdout.flush()
    saved, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)
