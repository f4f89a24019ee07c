"""Observes checkpoints through vLLM, in the interpreter that has vLLM, and prints what was found.

    python vllm_observe.py CHECKPOINT SOURCES BATCH LENGTH PASSES FIRST_POSITION

SOURCES is a list in JSON, FIRST_POSITION 0 or 1. On stdout: the result as JSON, or an `error: ` line.
"""

from __future__ import annotations

import json
import sys

from dodoco_ext.errors import DodocoError
from dodoco_ext.observatory import observe
from dodoco_ext.observatory.conditions import Shape
from dodoco_ext.observatory.loading import Loading
from dodoco_ext.observatory.models import load_model


def main(checkpoint: str, sources: str, batch: str, length: str, passes: str, first: str) -> None:
    shape = Shape(int(batch), int(length), int(passes), first_position=first == "1")
    given = json.loads(sources)
    loaded = load_model(
        checkpoint, Loading(dtype="float32", engine="vllm"), shape=shape, sources=given
    )
    result, _ = observe.run(
        loaded.runner,
        loaded.tokenizer,
        given,
        name=loaded.name,
        shape=shape,
        checkpoint=loaded.provenance,
    )
    print(result.to_json())


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except DodocoError as error:
        print(f"error: {error}")
