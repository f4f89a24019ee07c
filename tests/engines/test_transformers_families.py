"""Every MoE family of the installed transformers against an independent observer.

`observers.count` watches torch operations; `dodoco.attach` hooks modules. Both must give the same
counts, expert by expert, and the model must not notice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dodoco_ext as dodoco
import families
import observers
from dodoco_ext.errors import NothingToObserve
from dodoco_ext.integrations.transformers import Discovery, find_routers
from dodoco_ext.settings import Settings

OBSERVABLE = [
    family
    for family in (*families.families(), *families.PARTS)
    if family not in families.NOT_ROUTED
]


class HostError(Exception):
    """Raised inside a model."""


@pytest.fixture(autouse=True)
def _quiet_and_exact() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for models this small
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def settings(tmp_path: Any) -> Settings:
    return Settings(directory=tmp_path)


@pytest.mark.parametrize("family", OBSERVABLE)
def test_counts_equal_an_independent_observer_and_the_model_does_not_notice(
    family: str, settings: Settings, record_property: Any
) -> None:
    record_property(families.ROW, (family, families.NOT_BUILT.get(family, ""), *[""] * 5))
    if family in families.NOT_BUILT:
        pytest.skip(families.NOT_BUILT[family])
    model, inputs = families.build(family)
    expected = observers.count(family, model, inputs)
    before = _fingerprint(model)
    bare = model(**inputs)
    volatile = _changed(before, _fingerprint(model))

    found = find_routers(model)
    record_property(families.ROW, (family, *_describe(found)))
    assert not found.uncovered
    with dodoco.attach(model, settings=settings) as attachment:
        probed = model(**inputs)
        snapshot = attachment.snapshot()

    assert _changed(before, _fingerprint(model)) <= volatile
    _assert_identical(bare, probed)
    _assert_identical(bare, model(**inputs))

    counts = {layer.name: layer.counts.tolist() for layer in snapshot.layers}
    assert counts == _by_layer(expected, counts)
    assert all(len(set(row)) > 1 for row in counts.values()), "the routing tells nothing apart"
    for layer in snapshot.layers:
        assert layer.top_k == observers.top_k(family)
        assert layer.passes == 1
        assert layer.padded == layer.invalid == layer.recomputed == 0
        assert layer.assignments == sum(layer.counts.tolist())
        assert layer.assignments + layer.capacity_dropped == layer.tokens * layer.top_k
        if family not in ("nllb_moe", "switch_transformers"):
            assert layer.capacity_dropped == 0


@pytest.mark.parametrize("family", OBSERVABLE)
def test_a_model_that_raises_is_restored(family: str, settings: Settings) -> None:
    if family in families.NOT_BUILT:
        pytest.skip(families.NOT_BUILT[family])
    model, inputs = families.build(family)
    model(**inputs)
    last = find_routers(model).routers[-1].module

    def fail(*_: Any) -> None:
        raise HostError

    handle = last.register_forward_pre_hook(fail)
    before = _fingerprint(model)
    with pytest.raises(HostError):
        model(**inputs)
    volatile = _changed(before, _fingerprint(model))
    with pytest.raises(HostError), dodoco.attach(model, settings=settings) as attachment:
        model(**inputs)
    assert _changed(before, _fingerprint(model)) <= volatile
    assert attachment.snapshot().layers[-1].passes == 0
    handle.remove()


@pytest.mark.parametrize("family", sorted(families.NOT_ROUTED))
def test_experts_without_a_router_are_uncovered(
    family: str, settings: Settings, record_property: Any
) -> None:
    note = f"none: {families.NOT_ROUTED[family]}"
    record_property(families.ROW, (family, note, "", "uncovered", "", "", "0"))
    model, inputs = families.build(family)
    model(**inputs)
    found = find_routers(model)
    assert not found.routers
    assert len(found.uncovered) == 2
    with pytest.raises(NothingToObserve, match="not expert ids"):
        dodoco.attach(model, settings=settings)


def test_exceptions_name_families_that_exist() -> None:
    known = {*families.families(), *families.PARTS}
    exceptions = {*families.NOT_ROUTED, *families.NOT_BUILT}
    assert exceptions | set(families.OVERRIDES) <= known


def _describe(found: Discovery) -> tuple[str, ...]:
    def join(values: Any) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    routers = found.routers
    return (
        join(type(router.module).__name__ for router in routers),
        join(router.hook for router in routers),
        join(f"{router.form} ({router.extract.__name__})" for router in routers),
        join(router.num_experts for router in routers),
        join(router.top_k for router in routers),
        str(len(routers)),
    )


def _by_layer(expected: observers.Counts, layers: Any) -> observers.Counts:
    """Renames the observer's modules to the recorder's layers: those of the same block."""
    renamed: observers.Counts = {}
    for name, counts in expected.items():
        blocks = {layer.rpartition(".")[0]: layer for layer in layers}
        inside = [block for block in blocks if f"{name}.".startswith(f"{block}.")]
        assert inside, f"the router in {name} is not recorded"
        layer = blocks[max(inside, key=len)]
        assert layer not in renamed
        renamed[layer] = counts
    return renamed


def _fingerprint(model: torch.nn.Module) -> dict[tuple[str, str], Any]:
    """Every attribute of every module by identity; dictionaries, such as hooks, entry by entry."""
    prints: dict[tuple[str, str], Any] = {}
    for name, module in model.named_modules():
        prints[name, "class"] = type(module)
        for key, value in vars(module).items():
            if isinstance(value, dict):
                prints[name, key] = [(entry, id(item)) for entry, item in value.items()]
            else:
                plain = isinstance(value, (bool, int, float, str, tuple, type(None)))
                prints[name, key] = value if plain else id(value)
    return prints


def _changed(before: dict[Any, Any], after: dict[Any, Any]) -> set[Any]:
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def _assert_identical(one: Any, other: Any) -> None:
    ones, others = list(_tensors(one)), list(_tensors(other))
    assert len(ones) == len(others) > 0
    for a, b in zip(ones, others, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
