"""`dodoco template`: files that operators start from."""

from __future__ import annotations

import sys
from importlib import resources

import click

FILES = {
    "grafana": ("grafana.json", "a dashboard"),
    "alerts": ("alerts.yml", "alert rules for Prometheus, with their thresholds explained"),
    "k8s": ("k8s.yml", "a Kubernetes pod with the exporter as a sidecar"),
    "slurm": ("slurm.sh", "a prolog and epilog for Slurm that archive recordings"),
}


def content(name: str) -> str:
    """The text of a template."""
    return (resources.files("dodoco_ext") / "templates" / FILES[name][0]).read_text("utf-8")


@click.command(
    epilog="\b\nTemplates:\n"
    + "".join(f"  {name:<9} {what}\n" for name, (_, what) in FILES.items())
    + "\b\nExample:\n  dodoco template alerts > /etc/prometheus/dodoco.yml"
)
@click.argument("name", type=click.Choice(list(FILES)))
def template(name: str) -> None:
    """Print a dashboard, alert rules, or a deployment."""
    sys.stdout.write(content(name))
