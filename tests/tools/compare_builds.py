"""One text by two builds, in turns: what a change brought or cost. Prints medians over the runs, and their ratio.

Usage: python tests/tools/compare_builds.py OTHER ARTIFACT [--rounds 5] [--tokens 128] [--prompt TEXT] [-- FLAG ...]

`OTHER` is the folder that holds the other build's package `dovetail` (a checkout; for the builds before it had one, the
folder of links to its three parts). Further flags go to both builds' `dovetail generate`, such as `--no-draft`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

MAINS = ("dovetail.runtime.commands.cli", "dovetail.runtime.cli")  # today's, and that of builds before the rooms
FIGURES = {
    "tokens/s": lambda run: run["tokens_per_second"],
    "pass of the target, ms": lambda run: run["verify_ms"] / run["rounds"],
    "draft, ms a round": lambda run: run["draft_ms"] / run["rounds"],
    "host, ms a round": lambda run: run["host_ms_per_round"],
    "first token, ms": lambda run: run["prefill_ms"],
    "bytes to the draft, a round": lambda run: run["bytes_to_draft"] / run["rounds"],
    "bytes from the draft, a round": lambda run: run["bytes_from_draft"] / run["rounds"],
    "accept length": lambda run: run["accept_length_mean"],
}


def generate(package: Path, words: list[str]) -> dict[str, Any]:
    """The JSON document of `dovetail generate`, by the build in the folder `package`."""
    code = (
        "import importlib.util as u, sys\n"
        f"name = next(n for n in {MAINS!r} if u.find_spec(n.rpartition('.')[0]) and u.find_spec(n))\n"
        "sys.argv[0] = 'dovetail'\n"
        "__import__(name, fromlist=['main']).main()"
    )
    command = [sys.executable, "-P", "-c", code, "generate", *words, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(package)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{package}: {done.stderr}")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def main() -> None:
    own, _, flags = (list(part) for part in _split(sys.argv[1:]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("artifact")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt", default="import os\nimport sys\n\n\ndef main(argv):\n")
    options = parser.parse_args(own)
    words = [options.artifact, options.prompt, "-n", str(options.tokens), "--ignore-eos", "--temperature", "0", *flags]
    here = Path(__file__).resolve().parents[2]
    runs: dict[Path, list[dict[str, Any]]] = {options.other: [], here: []}
    for turn in range(options.rounds + 1):
        for package, made in runs.items():
            document = generate(package, words)
            if turn:  # the first reads the files into memory
                made.append(document)
    print(f"{'':<32}{'other':>10}{'here':>10}{'ratio':>8}")
    for name, figure in FIGURES.items():
        other, ours = (statistics.median(figure(run) for run in made) for made in runs.values())
        ratio = f"{ours / other:.2f}" if other else ""
        print(f"{name:<32}{other:>10.2f}{ours:>10.2f}{ratio:>8}")


def _split(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place : place + 1], words[place + 1 :]


if __name__ == "__main__":
    main()
