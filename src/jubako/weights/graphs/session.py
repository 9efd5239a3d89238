"""The seam to the program that runs graphs: open a file, get a callable from tensors to tensors.

ONNX Runtime stands behind it now. Tensors are bound where they are: on a GPU nothing goes through the host.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from jubako.errors import UnusableWeights
from jubako.memory import out_of_memory
from jubako.probe import preload
from jubako.weights.parts import beginning

__all__ = ["TORCH_DTYPES", "OrtGraph", "RunningGraph"]

logger = logging.getLogger(__name__)

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int32": torch.int32,
    "int64": torch.int64,
}
CPU = "CPUExecutionProvider"


class RunningGraph(Protocol):
    """A graph with its weights in memory."""

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The graph's outputs for inputs under the graph's own names, of its types, on its device."""
        ...


class OrtGraph:
    """An ONNX Runtime session on named providers and no others.

    Left to itself ONNX Runtime runs on the CPU what a GPU's provider can't take, and a provider that does not
    load is only a warning. Here both are errors, unless the CPU was asked for.
    """

    def __init__(
        self,
        file: Path,
        providers: Sequence[str],
        device: torch.device,
        options: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        import onnxruntime  # type: ignore[import-untyped] # publishes no types

        if device.type != "cpu":
            preload(onnxruntime)
        self._device = device
        if missing := [name for name in providers if name not in onnxruntime.get_available_providers()]:
            raise UnusableWeights(f"this onnxruntime has no {' and no '.join(missing)}")
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        if providers[0] == CPU:
            settings.intra_op_num_threads = torch.get_num_threads()
        else:
            settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        with_options = [(name, dict((options or {}).get(name, {}))) for name in providers]
        try:
            self._session = onnxruntime.InferenceSession(
                str(file), settings, providers=with_options, enable_fallback=0
            )
        except Exception as error:
            if out_of_memory(error):
                raise
            raise UnusableWeights(f"ONNX Runtime can't open {file}: {beginning(error)}") from error
        used = self._session.get_providers()
        if providers[0] not in used or set(used) - {*providers, CPU}:
            raise UnusableWeights(f"{file} was to run on {providers[0]} and runs on {', '.join(used)}")
        logger.info("%s: %s", file, self.assigned())

    def assigned(self) -> Mapping[str, int]:
        """How many of the graph's nodes each provider runs."""
        told = getattr(self._session, "get_provider_graph_assignment_info", None)
        counts: dict[str, int] = {}
        for part in told() if told else ():
            counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
        return counts

    def close(self) -> None:
        """Let go of the session and what it holds."""
        del self._session

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The graph's outputs, on the device of the inputs."""
        binding = self._session.io_binding()
        kind, index = self._device.type, self._device.index or 0
        for name, tensor in inputs.items():
            binding.bind_input(name, kind, index, _ONNX[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        names = [output.name for output in self._session.get_outputs()]
        for name in names:
            binding.bind_output(name, kind, index)
        if self._device.type != "cpu":
            # ONNX Runtime has a stream of its own, and must not read what is not there yet.
            torch.cuda.current_stream(self._device).synchronize()
        self._session.run_with_iobinding(binding)
        return dict(zip(names, map(_tensor, binding.get_outputs()), strict=True))


def _tensor(value: Any) -> torch.Tensor:
    """An output as a tensor, without a copy; it keeps the output's memory alive."""
    capsule = value._ortvalue.to_dlpack()  # noqa: SLF001 # ONNX Runtime has no public one
    return torch.utils.dlpack.from_dlpack(capsule)


# The numbers that ONNX gives its types: NumPy, by whose types they could be named, lacks bfloat16.
_ONNX: Mapping[torch.dtype, int] = {
    torch.float32: 1,
    torch.int32: 6,
    torch.int64: 7,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}
