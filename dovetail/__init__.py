"""Large language models on a CPU, several tokens per pass over the weights, without changing a single one.

>>> from dovetail import load
>>> with load("artifacts/pystd") as pipe:
...     print(pipe.generate("def main(argv):", max_new_tokens=32).text)

`dovetail.runtime` runs an artifact, `dovetail.export` makes one, `dovetail.calibration` measures a machine. The three
are links to the folders beside this one.
"""

from typing import TYPE_CHECKING, Any

from dovetail.runtime.privacy import send_no_reports

if TYPE_CHECKING:
    from dovetail.runtime import Chunk, EngineConfig, Generation, GenerationConfig, Pipeline, TreeShape, UserError, load

__all__ = ["Chunk", "EngineConfig", "Generation", "GenerationConfig", "Pipeline", "TreeShape", "UserError", "load"]

send_no_reports()  # the one thing that an import does: it must come before the engines are imported


def __getattr__(name: str) -> Any:
    """The runtime's public names, imported on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dovetail import runtime

    return getattr(runtime, name)
