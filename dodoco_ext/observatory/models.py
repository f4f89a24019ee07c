"""Loading the model to observe, with errors of one line."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.corpus import sha256_of
from dodoco_ext.observatory.data import first_line

if TYPE_CHECKING:
    from dodoco_ext.observatory.streamed import StreamedModel


DTYPES = ("auto", "float32", "bfloat16", "float16")
"""In which a model can be computed; `auto` is its own."""


@dataclass(frozen=True)
class Loading:
    """How a model is loaded.

    Attributes:
        dtype: One of `DTYPES`.
        device_map: As transformers takes it (`auto`, `cpu`, `cuda:0`), through the package
            accelerate, which also offloads what does not fit; None for the CPU.
        streamed: Layer by layer over all batches (`streamed.StreamedModel`), whatever its size.
    """

    dtype: str = "auto"
    device_map: str | None = None
    streamed: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"dtype={self.dtype!r} is unknown: give one of {', '.join(DTYPES)}")
        if self.streamed and self.device_map is not None:
            raise InputError("streaming runs on the CPU: leave out --device-map or --streamed")
        if self.device_map is not None and find_spec("accelerate") is None:
            raise InputError(
                f"device_map={self.device_map!r} needs the package accelerate: pip install accelerate"
            )


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model and its tokenizer.

    Attributes:
        name: The source without folders.
        model: In evaluation mode.
        tokenizer: The tokenizer stored with it.
        streamed: What runs it layer by layer, where it was loaded so.
        provenance: Revision, digests, data type, backends and placement.
    """

    name: str
    model: Any
    tokenizer: Any
    streamed: StreamedModel | None = None
    provenance: dict[str, str] = field(default_factory=dict)


def load_model(source: str, loading: Loading | None = None) -> LoadedModel:
    """Loads a model and its tokenizer from this package, from a folder or from the hub.

    Args:
        source: `zoo:NAME`, a folder written by `save_pretrained`, or a model id such as `org/name`.
        loading: How; by default whole, on the CPU, in its own data type.

    Raises:
        InputError: It is not there, not readable offline, no causal language model, or its
            vocabulary is larger than its embedding.
    """
    loading = loading or Loading()
    if find_spec("transformers") is None:
        raise InputError("observing needs transformers: pip install 'dodoco-ext[transformers]'")
    from dodoco_ext.observatory.zoo import deepseek, shipped

    deepseek.register()
    if source.startswith(shipped.PREFIX):
        folder = shipped.model_folder(source.removeprefix(shipped.PREFIX))
        return _load(source, folder, str(shipped.tokenizer_folder()), loading)
    folder = Path(source).expanduser()
    if source.startswith((".", "/", "~")) and not folder.is_dir():
        raise InputError(
            f"no such model folder: {source}; give a folder with config.json or a model id"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(
            f"{source} holds no config.json: give the folder that save_pretrained wrote"
        )
    return _load(source, folder, str(folder) if folder.is_dir() else source, loading)


def _load(source: str, folder: Path, tokenizer_from: str, loading: Loading) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from dodoco_ext.observatory.zoo.shipped import PREFIX

    where = str(folder) if folder.is_dir() else source
    shipped = source.startswith(PREFIX)
    # Stored in half precision to be small, meant to be computed in single.
    dtype = "float32" if shipped and loading.dtype == "auto" else loading.dtype
    options: dict[str, Any] = {"dtype": dtype}
    if loading.device_map is not None:
        options["device_map"] = loading.device_map
    if shipped:
        options["experts_implementation"] = "grouped_mm"
    streamed = None
    with quiet():
        try:
            config = AutoConfig.from_pretrained(where)  # one small file: an unknown id fails early
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_from)
            if loading.streamed:
                streamed = _streamed(folder, source, dtype)
                model = streamed.model
            else:
                model = AutoModelForCausalLM.from_pretrained(where, config=config, **options)
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
            raise InputError(
                f"cannot load the model {source!r} ({first_line(error)}): {advice}"
            ) from None
    check_vocabulary(model, tokenizer, source)
    name = source if shipped or not folder.is_dir() else folder.resolve().name
    facts = provenance_of(model, tokenizer, folder if folder.is_dir() else None)
    facts["loading"] = "layer by layer" if loading.streamed else "whole"
    return LoadedModel(name, model.eval(), tokenizer, streamed, facts)


def provenance_of(model: Any, tokenizer: Any, folder: Path | None) -> dict[str, str]:
    """What a result says of the checkpoint behind it, without paths.

    Args:
        model: As loaded.
        tokenizer: As loaded.
        folder: The checkpoint's folder, whose weights are digested; None for one of the hub, which
            its revision names.
    """
    config = model.config
    facts = {
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "placement": ", ".join(sorted({p.device.type for p in model.parameters()})),
    }
    for key, attribute in (
        ("revision", "_commit_hash"),
        ("attention backend", "_attn_implementation"),
        ("experts backend", "_experts_implementation"),
    ):
        if value := getattr(config, attribute, None):
            facts[key] = str(value)
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


def check_vocabulary(model: Any, tokenizer: Any, source: str) -> None:
    """Refuses a tokenizer whose ids the model has no embedding for.

    Raises:
        InputError: The largest id is not below the number of embedding rows.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
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
    try:
        yield
    finally:
        for library, verbosity in verbosities:
            library.set_verbosity(verbosity)
        if had_bars:
            transformers.enable_progress_bar()
