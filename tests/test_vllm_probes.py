"""The recorder in vLLM's routers, against stand-ins for the two classes that it touches."""

from __future__ import annotations

import pytest
import torch

from dodoco_ext.errors import NothingToObserve
from dodoco_ext.integrations.vllm import attach_loaded
from vllm_stubs import EXPERTS, IDS, TOKENS, TOP_K, BaseRouter, MegaExperts, MoERunner, install


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)


def model(*runners: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.ModuleList(runners)


def test_a_pass_is_counted_by_logical_experts_with_no_room_for_replicas() -> None:
    routers = [BaseRouter(), BaseRouter()]
    with attach_loaded(model(*map(MoERunner, routers))) as attachment:
        for router in routers:
            router.select(IDS)
        layers = attachment.snapshot().layers
    assert [(layer.name, layer.num_experts, layer.top_k) for layer in layers] == [
        ("0", EXPERTS, TOP_K),
        ("1", EXPERTS, TOP_K),
    ]
    expected = torch.bincount(IDS.flatten(), minlength=EXPERTS).tolist()
    assert [layer.counts.tolist() for layer in layers] == [expected] * 2


def test_what_was_there_goes_on_being_called_and_is_put_back() -> None:
    router, seen = BaseRouter(), []
    router.set_capture_fn(seen.append)
    theirs = router.capture_fn
    attachment = attach_loaded(model(MoERunner(router)))
    router.select(IDS)
    attachment.detach()
    attachment.detach()
    assert router.capture_fn is theirs
    router.select(IDS)
    assert len(seen) == 2
    assert attachment.snapshot().layers[0].passes == 1


def test_somebody_who_comes_later_is_called_too_and_stays() -> None:
    router, seen = BaseRouter(), []
    attachment = attach_loaded(model(MoERunner(router)))
    theirs = seen.append
    router.set_capture_fn(theirs)
    router.select(IDS)
    assert len(seen) == attachment.snapshot().layers[0].passes == 1
    attachment.detach()
    assert router.capture_fn == theirs
    router.select(IDS)
    assert len(seen) == 2
    assert attachment.snapshot().layers[0].passes == 1


def test_a_pass_is_counted_once_where_somebody_who_comes_later_calls_ours() -> None:
    router = BaseRouter()
    with attach_loaded(model(MoERunner(router))) as attachment:
        ours = router.capture_fn
        assert ours is not None
        router.set_capture_fn(lambda ids: ours(ids))
        router.select(IDS)
        assert attachment.snapshot().layers[0].passes == 1
        router.set_capture_fn(None)
        router.select(IDS)
        assert attachment.snapshot().layers[0].passes == 2


def test_paused_passes_are_not_counted() -> None:
    router = BaseRouter()
    with attach_loaded(model(MoERunner(router))) as attachment:
        attachment.enabled = False
        router.select(IDS)
        attachment.enabled = True
        router.select(IDS)
        assert attachment.snapshot().layers[0].tokens == TOKENS


def test_layers_that_hand_out_no_ids_are_reported_and_not_shown_as_zeros() -> None:
    found = model(
        MoERunner(BaseRouter()),
        MoERunner(BaseRouter(), monolithic=True),
        MoERunner(object()),
        MegaExperts(),
    )
    with attach_loaded(found) as attachment:
        assert [layer.name for layer in attachment.layers] == ["0"]
        assert [(part.name, part.reason) for part in attachment.uncovered] == [
            ("1", "the kernel of its SimpleNamespace chooses the experts itself"),
            ("2", "object hands out no expert ids"),
            ("3", "MegaExperts is a kernel that chooses the experts itself"),
        ]
        assert len(attachment.reader.metadata["uncovered"]) == 3


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(NothingToObserve, match="it has none; give a mixture-of-experts model"):
        attach_loaded(torch.nn.Linear(2, 2))
    with pytest.raises(NothingToObserve, match="0: the kernel of its"):
        attach_loaded(model(MoERunner(BaseRouter(), monolithic=True)))
