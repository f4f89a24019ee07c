"""`python -m dodoco_ext.observatory.zoo`: trains the zoo's models (`make zoo`)."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dodoco_ext.errors import DodocoError
from dodoco_ext.observatory.zoo import shipped
from dodoco_ext.observatory.zoo.card import table
from dodoco_ext.observatory.zoo.make import make_zoo, prepare_material
from dodoco_ext.observatory.zoo.species import SPECIES, species
from dodoco_ext.observatory.zoo.text import corpora
from dodoco_ext.observatory.zoo.training import Plan


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("results/zoo"),
    show_default=True,
    help="Folder of the models.",
)
@click.option(
    "--only", multiple=True, metavar="NAME", help=f"One of {', '.join(SPECIES)}; several."
)
@click.option("--seed", type=click.IntRange(min=0, max=2**32 - 1), default=0, show_default=True)
@click.option(
    "--num-steps", type=click.IntRange(min=1), default=Plan().num_steps, show_default=True
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of fetched packages. [default: ~/.cache/dodoco]",
)
@click.option("--cards", is_flag=True, help="Print the figures of the shipped models instead.")
def main(
    out: Path, only: tuple[str, ...], seed: int, num_steps: int, cache: Path | None, cards: bool
) -> None:
    """Train the zoo's models on text of the standard library and of published packages."""
    plan = Plan(num_steps=num_steps)
    try:
        if cards:
            click.echo(table(shipped.cards()))
            return
        kinds = [species(name) for name in only or SPECIES]
        click.echo("reading texts, learning the tokenizer ...")
        material = prepare_material(corpora(cache), plan)
        for kind in kinds:
            (card,) = make_zoo([kind], material, plan, seed, out, _tell)
            mean = card.mean
            click.echo(
                f"{card.name}: held-out loss {mean.loss:.3f} (bigram {mean.bigram:.3f}, unigram "
                f"{mean.unigram:.3f}), {card.cpu_seconds:.0f} s of CPU time, {out / card.name}"
            )
    except DodocoError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


def _tell(name: str, done: int, total: int, loss: float) -> None:
    if done % 100 == 0 or done == total:
        click.echo(f"{name}: step {done:,} of {total:,}, loss {loss:.3f}")


if __name__ == "__main__":
    main()
