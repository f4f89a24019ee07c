"""What is known of the paper's published figures, to stand beside one's own; arXiv 2605.20982, May 2026.

None of these was measured here. Only figures that the abstract states are given, as bounds where it gives
bounds. The aggregation of its Gini and max/mean, batch sizes and sequence lengths are not known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Band = Literal["data-resilient", "intermediate", "persistently concentrated"]

SOURCE = "arXiv 2605.20982"

MOCK_OVER_REAL = 2.35
"""Mock tokens overestimate the Gini of routing by up to this factor."""

EP_CHANGE = 0.05
"""Per-expert max/mean changes by at most this share from EP 4 to EP 32."""


@dataclass(frozen=True)
class PublishedModel:
    """What is published of one checkpoint.

    Attributes:
        checkpoint, mixer: The model.
        zoo: The small model here with the same mixer, by its `--model` name.
        band: As published.
        says: The published statement.
        short: The same in a few words.
        lowest: What it says of the lowest Gini over the real texts: above the first, at most the second.
        stated: The bounds are figures that were published; False: they only restate the word "between".
        mock: Published range on mock tokens, or None.
    """

    checkpoint: str
    mixer: str
    zoo: str
    band: Band
    says: str
    short: str
    lowest: tuple[float, float]
    stated: bool = True
    mock: tuple[float, float] | None = None


_CONCENTRATED = "above 0.24 on every real-text condition, 0.29 to 0.38 on mock"

MODELS = (
    PublishedModel(
        "deepseek-ai/deepseek-moe-16b-base",
        "MHA",
        "zoo:mha",
        "data-resilient",
        "0.105 on wikitext",
        "0.105 on wikitext",
        (0.0, 0.105),
    ),
    PublishedModel(
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16",
        "Mamba-2 + attention",
        "zoo:mamba2",
        "data-resilient",
        "0.150 on wikitext",
        "0.150 on wikitext",
        (0.0, 0.150),
    ),
    PublishedModel(
        "Qwen/Qwen3-30B-A3B",
        "GQA",
        "zoo:gqa",
        "intermediate",
        "between the two bands; no figure is known",
        "between, no figure known",
        (0.150, 0.24),
        stated=False,
    ),
    PublishedModel(
        "deepseek-ai/DeepSeek-V2-Lite",
        "MLA",
        "zoo:mla",
        "persistently concentrated",
        _CONCENTRATED,
        "above 0.24",
        (0.24, 1.0),
        mock=(0.29, 0.38),
    ),
    PublishedModel(
        "Qwen/Qwen3.5-35B-A3B-Base",
        "Gated DeltaNet + attention",
        "zoo:gdn",
        "persistently concentrated",
        _CONCENTRATED,
        "above 0.24",
        (0.24, 1.0),
        mock=(0.29, 0.38),
    ),
)
