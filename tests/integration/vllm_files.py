"""A process that answers, for each folder named on standard input, which files vLLM's own loader would read."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.model_loader.weight_utils import _natural_sort_key

    answers, sys.stdout = sys.stdout, sys.stderr  # the library prints too
    for line in sys.stdin:
        folder = line.strip()
        try:
            _, files, safe, _ = DefaultModelLoader(LoadConfig())._prepare_weights(folder, None, None, True, None)
            ordered = sorted(files, key=_natural_sort_key) if safe else sorted(files)
            answer = [str(Path(f).relative_to(folder)) for f in ordered]
        except (RuntimeError, FileNotFoundError, KeyError):
            answer = None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
