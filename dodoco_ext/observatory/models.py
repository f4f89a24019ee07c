"""Loading the model to observe, with errors of one line."""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dodoco_ext.errors import InputError
from dodoco_ext.observatory import quantization
from dodoco_ext.observatory.conditions import Shape
from dodoco_ext.observatory.corpus import sha256_of
from dodoco_ext.observatory.data import first_line
from dodoco_ext.observatory.loading import Loading

if TYPE_CHECKING:
    from dodoco_ext.observatory.runners import Runner
    from dodoco_ext.observatory.streamed import StreamedModel


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model and its tokenizer.

    Attributes:
        name: The source without folders.
        runner: What runs it.
        tokenizer: The tokenizer stored with it.
        provenance: Revision, digests, data type, backends, placement and quantisation.
    """

    name: str
    runner: Runner
    tokenizer: Any
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The module that computes."""
        return self.runner.model


def load_model(
    source: str,
    loading: Loading | None = None,
    *,
    shape: Shape | None = None,
    sources: Sequence[str] = (),
) -> LoadedModel:
    """Loads a model and its tokenizer from this package, from a folder or from the hub.

    Args:
        source: `zoo:NAME`, a folder written by `save_pretrained`, or a model id such as `org/name`.
        loading: How; by default whole, on the CPU, in its own data type.
        shape: The passes that will be run, which vLLM must know; by default those of the demo.
        sources: The conditions that will be run: those that cannot are refused before loading.

    Raises:
        InputError: It is not there, not readable offline, no causal language model, or its
            vocabulary is larger than its embedding.
    """
    loading, shape = loading or Loading(), shape or Shape(8, 128, 32)
    _runner_class(loading).refuse(sources, shape)
    if find_spec("transformers") is None:
        raise InputError("observing needs transformers: pip install 'dodoco-ext[transformers]'")
    with quiet():
        from dodoco_ext.observatory.zoo import deepseek, shipped

        deepseek.register()
    if source.startswith(shipped.PREFIX):
        folder = shipped.model_folder(source.removeprefix(shipped.PREFIX))
        return _load(source, folder, str(shipped.tokenizer_folder()), loading, shape)
    folder = Path(source).expanduser()
    if source.startswith((".", "/", "~")) and not folder.is_dir():
        raise InputError(
            f"no such model folder: {source}; give a folder with config.json or a model id"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(
            f"{source} holds no config.json: give the folder that save_pretrained wrote"
        )
    return _load(source, folder, str(folder) if folder.is_dir() else source, loading, shape)


def display_name(source: str) -> str:
    """What results call a model: its source, without folders."""
    folder = Path(source).expanduser()
    return folder.resolve().name if folder.is_dir() else source


def _runner_class(loading: Loading) -> type[Runner]:
    from dodoco_ext.observatory.engine_vllm import VllmRunner
    from dodoco_ext.observatory.resident import Resident, Streamed

    if loading.engine == "vllm":
        return VllmRunner
    return Streamed if loading.streamed else Resident


def _load(
    source: str, folder: Path, tokenizer_from: str, loading: Loading, shape: Shape
) -> LoadedModel:
    from transformers import AutoConfig, AutoTokenizer

    from dodoco_ext.observatory.zoo.shipped import PREFIX

    where = str(folder) if folder.is_dir() else source
    shipped = source.startswith(PREFIX)
    # Stored in half precision to be small, meant to be computed in single.
    dtype = "float32" if shipped and loading.dtype == "auto" else loading.dtype
    with quiet():
        try:
            config = AutoConfig.from_pretrained(where)  # one small file: an unknown id fails early
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
            runner = _runner(where, folder, config, replace(loading, dtype=dtype), shape, shipped)
        except InputError:
            raise
        except (
            Exception
        ) as error:  # the hub, safetensors and remote configurations raise types of their own
            advice = (
                "check the files of the folder"
                if folder.is_dir()
                else "check the id, be online, or give a local folder"
            )
            if loading.quantization is not None:
                advice = "leave out --quantization, or try another"
            raise InputError(
                f"cannot load the model {source!r} ({first_line(error)}): {advice}"
            ) from None
    check_vocabulary(runner.embedding_rows, tokenizer, source)
    name = display_name(source)
    facts = provenance_of(runner, config, tokenizer, folder if folder.is_dir() else None)
    facts["loading"] = "layer by layer" if loading.streamed else "whole"
    return LoadedModel(name, runner, tokenizer, facts)


def _runner(
    where: str, folder: Path, config: Any, loading: Loading, shape: Shape, shipped: bool
) -> Runner:
    from transformers import AutoModelForCausalLM

    from dodoco_ext.observatory.engine_vllm import VllmRunner
    from dodoco_ext.observatory.resident import Resident, Streamed

    if loading.engine == "vllm":
        # vLLM takes `auto` for half precision where weights are stored in single.
        dtype = loading.dtype
        if dtype == "auto":
            dtype = str(config.get_text_config().dtype or "float32").removeprefix("torch.")
        return VllmRunner(where, config, dtype, shape)
    if loading.streamed:
        return Streamed(_streamed(folder, where, loading.dtype))
    options: dict[str, Any] = {"dtype": loading.dtype, **loading.placement()}
    if shipped:
        options["experts_implementation"] = "grouped_mm"
    if loading.quantization is not None:
        options["quantization_config"] = quantization.config_of(loading.quantization)
    # What is offloaded to disk is stored anew, in the layout in which it is computed.
    offload = None
    if loading.device_map is not None:
        offload = TemporaryDirectory(prefix="dodoco-offload-")
        options["offload_folder"] = offload.name
    model = AutoModelForCausalLM.from_pretrained(where, config=config, **options)
    if offload is not None:
        weakref.finalize(model, offload.cleanup)
    if loading.quantization is not None and not quantization.quantised_weights(model):
        raise InputError(
            f"quantization={loading.quantization!r} changes nothing in {folder.name}: its layers have "
            "sizes that this method passes over; leave it out, or try another"
        )
    return Resident(model.eval())


def provenance_of(
    runner: Runner, config: Any, tokenizer: Any, folder: Path | None
) -> dict[str, str]:
    """What a result says of the checkpoint behind it, without paths.

    Args:
        runner: The model as loaded.
        config: As it is stored.
        tokenizer: As loaded.
        folder: The checkpoint's folder, whose weights are digested; None for one of the hub, which
            its revision names.
    """
    facts = runner.provenance()
    if revision := getattr(config, "_commit_hash", None):
        facts["revision"] = str(revision)
    loaded_config = getattr(runner.model, "config", config)
    if found := quantization.described(loaded_config) or quantization.described(config):
        facts["quantization"] = found
        if weights := quantization.quantised_weights(runner.model):
            facts["quantization"] += f", {weights} weights"
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        facts["tokenizer sha256"] = sha256_of([backend.to_str()])
    if folder is not None:
        facts["weights sha256"] = _weights_digest(folder)
    template = getattr(tokenizer, "chat_template", None)
    facts["chat template"] = "none applied" + (" (the tokenizer has one)" if template else "")
    return facts


def _weights_digest(folder: Path) -> str:
    """Of the safetensors files in name order: of one file its own digest, else a digest of their digests."""
    digests = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else sha256_of(digests)


def _streamed(folder: Path, source: str, dtype: str) -> StreamedModel:
    import torch
    from huggingface_hub import snapshot_download

    from dodoco_ext.observatory.streamed import StreamedModel

    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors"]))
    return StreamedModel(folder, None if dtype == "auto" else getattr(torch, dtype))


def check_vocabulary(rows: int, tokenizer: Any, source: str) -> None:
    """Refuses a tokenizer whose ids the model has no embedding for.

    Raises:
        InputError: The largest id is not below the number of embedding rows.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise InputError(
            f"vocabulary mismatch in {source}: the tokenizer has ids up to {largest}, the model "
            f"embeds {rows} (0 to {rows - 1}); give the tokenizer that the model was trained with"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' bars and warnings out of the way of our own bars and one-line errors."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as transformers

    had_bars = transformers.is_progress_bar_enabled()
    verbosities = [(library, library.get_verbosity()) for library in (hub, transformers)]
    transformers.disable_progress_bar()
    for library, _ in verbosities:
        library.set_verbosity(logging.CRITICAL)
    # transformers imports torchao where it is installed, which tells of each kernel that it lacks.
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for library, verbosity in verbosities:
            library.set_verbosity(verbosity)
        if had_bars:
            transformers.enable_progress_bar()
