"""OpenVINO GenAI in a process of its own: a process that has loaded it crashes when torch trains in it later.

Run as a script it reads a job from stdin and writes the answers to stdout, both JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def genai_greedy(folder: Path, prompts: list[Any], max_new_tokens: int, **settings: str) -> list[Any]:
    """What GenAI's LLMPipeline of `folder` adds to each prompt, greedily: token ids for ids, text for text."""
    job = {"folder": str(folder), "prompts": prompts, "max_new_tokens": max_new_tokens, "settings": settings}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return answers


def main() -> None:
    import numpy as np
    import openvino as ov
    import openvino_genai

    job = json.load(sys.stdin)
    pipe = openvino_genai.LLMPipeline(job["folder"], "CPU", **job["settings"])
    config = openvino_genai.GenerationConfig(max_new_tokens=job["max_new_tokens"], ignore_eos=True, do_sample=False)
    answers: list[Any] = []
    for prompt in job["prompts"]:
        if isinstance(prompt, str):
            answers.append(str(pipe.generate(prompt, config)))
        else:
            ids = np.array([prompt], np.int64)
            inputs = openvino_genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
            answers.append([int(token) for token in pipe.generate(inputs, config).tokens[0]])
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
