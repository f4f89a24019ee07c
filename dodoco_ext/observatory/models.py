"""Loading the model to observe, with errors of one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.data import first_line


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model and its tokenizer.

    Attributes:
        name: The source without folders.
        model: In evaluation mode, on the CPU.
        tokenizer: The tokenizer stored with it.
    """

    name: str
    model: Any
    tokenizer: Any


def load_model(source: str) -> LoadedModel:
    """Loads a model and its tokenizer from a folder or from the hub.

    Args:
        source: A folder written by `save_pretrained`, or a model id such as `org/name`.

    Raises:
        InputError: It is not there, not readable offline, no causal language model, or its
            vocabulary is larger than its embedding.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise InputError(
            "observing needs transformers: pip install 'dodoco-ext[transformers]'"
        ) from None
    folder = Path(source).expanduser()
    if source.startswith((".", "/", "~")) and not folder.is_dir():
        raise InputError(
            f"no such model folder: {source}; give a folder with config.json or a model id"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(
            f"{source} holds no config.json: give the folder that save_pretrained wrote"
        )
    where = str(folder) if folder.is_dir() else source
    with quiet():
        try:
            config = AutoConfig.from_pretrained(where)  # one small file: an unknown id fails early
            tokenizer = AutoTokenizer.from_pretrained(where)
            model = AutoModelForCausalLM.from_pretrained(where, config=config, dtype="auto")
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
    return LoadedModel(
        folder.resolve().name if folder.is_dir() else source, model.eval(), tokenizer
    )


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
