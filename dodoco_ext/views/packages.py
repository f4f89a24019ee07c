"""The packages that parts of DODOCO need, and how to get them; looked up without importing any."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata


@dataclass(frozen=True)
class Package:
    """An optional package.

    Attributes:
        name: Distribution name.
        minimum: Lowest supported version, as numbers; () for any.
        needed_for: What does not work without it.
        extra: The extra of dodoco-ext that brings it; None where it is the user's own to choose.
    """

    name: str
    minimum: tuple[int, ...]
    needed_for: str
    extra: str | None

    @property
    def remedy(self) -> str:
        """How to install it."""
        if self.extra is not None:
            return f"pip install 'dodoco-ext[{self.extra}]'"
        if self.name == "datasets":
            return "pip install datasets"
        return f"install the {self.name} that fits this machine; dodoco-ext never brings its own"


PACKAGES = (
    Package("torch", (2, 11), "recording", None),
    Package("triton", (3, 6), "GPU kernels; CPU models are recorded without it", None),
    Package("transformers", (5,), "models of transformers, `dodoco observe`", "transformers"),
    Package("tokenizers", (), "`dodoco observe`", "transformers"),
    Package("safetensors", (), "`dodoco observe`", "transformers"),
    Package("datasets", (), "`dodoco observe --data` with the name of a data set", None),
    Package("matplotlib", (3, 8), "the report of `dodoco observe`", "report"),
    Package("jinja2", (3, 1), "the report of `dodoco observe`", "report"),
    Package("pyarrow", (16,), "Snapshot.to_arrow(), traces", "trace"),
    Package("pandas", (2, 2), "Snapshot.to_pandas(), traces", "trace"),
    Package("textual", (8,), "`dodoco top`; its --once needs none", "top"),
    Package("prometheus-client", (0, 20), "metrics for Prometheus", "prometheus"),
)


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_older(version: str, minimum: tuple[int, ...]) -> bool:
    """Whether a version is below a minimum; pre-releases count as their release."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return numbers is not None and tuple(map(int, numbers[0].split("."))) < minimum


def remedy(module: str) -> str:
    """How to get a missing module."""
    for package in PACKAGES:
        if package.name.replace("-", "_") == module:
            return package.remedy
    return f"pip install {module}"
