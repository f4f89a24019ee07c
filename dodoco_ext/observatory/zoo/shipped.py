"""The zoo's trained models, as they come with this package."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from dodoco_ext.errors import InputError
from dodoco_ext.observatory.zoo.card import Card
from dodoco_ext.observatory.zoo.species import SPECIES, species

PREFIX = "zoo:"
"""What names one of them as a model: `zoo:gqa`."""


def weights_folder() -> Path:
    """Where the models lie, one folder each, beside the one of their tokenizer.

    Raises:
        InputError: The package lies in an archive, or was installed without them.
    """
    with as_file(files("dodoco_ext.observatory.zoo") / "weights") as folder:
        if not (folder / "tokenizer" / "tokenizer.json").is_file():
            raise InputError(
                f"no trained models in {folder}: install dodoco-ext from its wheel, or train them "
                "(python -m dodoco_ext.observatory.zoo) and give --model FOLDER"
            )
        return folder


def model_folder(name: str) -> Path:
    """The folder of one model.

    Args:
        name: A key of `species.SPECIES`.

    Raises:
        InputError: There is no such model, or it is not installed.
    """
    species(name)
    folder = weights_folder() / name
    if not (folder / "model.safetensors").is_file():
        raise InputError(
            f"zoo:{name} is not installed: train it (make zoo) and give --model FOLDER"
        )
    return folder


def tokenizer_folder() -> Path:
    """The folder of the tokenizer that all of them share."""
    return weights_folder() / "tokenizer"


def cards() -> dict[str, Card]:
    """The card of every model, by name."""
    return {name: Card.read(model_folder(name)) for name in SPECIES}
