"""A plugin of vLLM for `vllm_overhead.py`: SIGUSR1 takes the recorder out of a worker, or puts it back in.

In an eager server that is exactly the server without it: no function of vLLM's is wrapped, no router
calls it.
"""

from __future__ import annotations

import signal
from typing import Any

from dodoco_ext.integrations import vllm_serving


def register() -> None:
    serve = vllm_serving.serve

    def toggled(runner: Any, config: Any) -> Any:
        held = [serve(runner, config)]

        def toggle(*_: object) -> None:
            if held[0] is None:
                held[0] = serve(runner, config)
            else:
                held[0].stop()
                held[0] = None

        signal.signal(signal.SIGUSR1, toggle)
        return held[0]

    vllm_serving.serve = toggled
