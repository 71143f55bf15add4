"""Runs a Dovetail artifact: numpy, OpenVINO and ONNX Runtime, no torch.

>>> from dovetail import load
>>> pipe = load("artifacts/pystd")
>>> print(pipe.generate("def main():", temperature=0.8, seed=1).text)

`pipeline` is where everything is put together, and `decoding` where texts are made. docs/architecture.md follows a
token through all of it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail.runtime.decoding.engine_config import EngineConfig
    from dovetail.runtime.decoding.feed import Outcome, Request
    from dovetail.runtime.decoding.generation import Chunk, Generation
    from dovetail.runtime.errors import UserError
    from dovetail.runtime.pipeline import Pipeline, load
    from dovetail.runtime.sampling.config import GenerationConfig
    from dovetail.runtime.trees.shape import TreeShape

__all__ = [
    "Chunk",
    "EngineConfig",
    "Generation",
    "GenerationConfig",
    "Outcome",
    "Pipeline",
    "Request",
    "TreeShape",
    "UserError",
    "load",
]

_HOMES = {
    "Chunk": "decoding.generation",
    "EngineConfig": "decoding.engine_config",
    "Generation": "decoding.generation",
    "GenerationConfig": "sampling.config",
    "Outcome": "decoding.feed",
    "Pipeline": "pipeline",
    "Request": "decoding.feed",
    "TreeShape": "trees.shape",
    "UserError": "errors",
    "load": "pipeline",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line must answer before numpy and the engines are loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
