"""The torch ops that a probe calls: `dodoco::route_ids`, `route_map`, `route_bits`.

All three take the router's decision and a *site*, the tensor that says which layer of which
recording it belongs to. Nothing else is an argument, so twelve layers compile to one graph, and
`Tensor(a!)` keeps compilers from removing a call whose result nobody uses.
"""

from __future__ import annotations

import logging

import torch

from dodoco_ext import _C
from dodoco_ext.recorder import Recorder

log = logging.getLogger("dodoco")

_ID_BYTES = {torch.int16: 2, torch.int32: 4, torch.int64: 8}
_COPIED, _NO_LANE = -1, -5
_FAULTS = {
    _COPIED: _C.Fault.COPIED_SITE,
    -2: _C.Fault.BAD_SHAPE,
    -3: _C.Fault.TOO_LARGE,
    -4: _C.Fault.INTERNAL,
    _NO_LANE: _C.Fault.NO_LANE,
    -6: _C.Fault.DEVICE_ERROR,
}
# Faults of one call: the probe stays on.
_PASSING = (_C.Fault.COPIED_SITE, _C.Fault.NO_LANE)
# Address of a bound site -> its recorder and the name of the layer. Keeps the recorder open.
_bound: dict[int, tuple[Recorder, str]] = {}
_logged: set[tuple[int, str]] = set()

_record_ids = _C.route_ids
_record_map = _C.route_map
_in_backward = torch._C._current_graph_task_id


def make_site(recorder: Recorder, layer: int, place: str = "cpu") -> torch.Tensor:
    """Creates the site of a layer.

    Args:
        recorder: The open recording.
        layer: Index of the layer in `recorder.layers`.
        place: Where the layer's choices will be: `cpu`, or one of `recorder.devices`.

    Returns:
        int64 [8] in that place; it must be passed whole, and a copy of it records nothing.
    """
    if place != "cpu":
        site = recorder.devices[place].site(layer)
    else:
        with torch.inference_mode(False):
            site = torch.zeros(_C.SITE_BYTES // 8, dtype=torch.int64)
    # What torch._dynamo.mark_static_address(site, guard=False) sets, without importing the
    # compiler: CUDA graphs need the static address, a guard on it would recompile every layer.
    site._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
    address = site.data_ptr()
    if place == "cpu":
        recorder.bind(layer, site, address)
    _bound[address] = (recorder, recorder.layers[layer].name)
    return site


def is_bound(site: torch.Tensor | None) -> bool:
    """Whether this very tensor (not a copy of it) leads to an open recording."""
    return site is not None and site.data_ptr() in _bound


def release_site(address: int) -> None:
    """Forgets the site at an address. The last site of a recorder closes its recording."""
    recorder, _ = _bound.pop(address, (None, ""))
    _logged.difference_update([logged for logged in _logged if logged[0] == address])
    if recorder is not None and all(other is not recorder for other, _ in _bound.values()):
        recorder.close()


def report_fault(site: torch.Tensor, fault: _C.Fault, detail: str) -> None:
    """Logs a telemetry fault once, counts it in the recording, and disables the probe.

    A copied site is only logged: its original goes on recording.
    """
    # A device's site is not read back: that would wait for the device.
    original = site.data_ptr() if site.is_cuda else int(site[1].item())
    recorder, name = _bound.get(original, (None, "a detached layer"))
    if (original, fault.name) not in _logged:
        _logged.add((original, fault.name))
        log.error("telemetry fault %s at %s: %s", fault.name, name, detail)
    if recorder is not None:
        recorder.add_fault(fault)
    if fault in _PASSING:
        return
    if site.is_cuda:
        _C.switch_off_device_site(original)
    else:
        site[0] = 0


def _refused(result: int, tensor: torch.Tensor, site: torch.Tensor) -> None:
    """Reports what C++ would not record: a negative result."""
    detail = (
        f"{tensor.dtype} of shape {list(tensor.shape)} cannot be recorded; this probe is now off"
    )
    if result == _COPIED and tensor.device != site.device:
        detail = (
            f"the router is on {tensor.device} now, and was on {site.device} when it was attached "
            "to: attach() after moving the model"
        )
    elif result == _COPIED:
        detail = (
            "a copy of the site arrived, so nothing was recorded: either the model was copied "
            "(attach to the copy), or a compiler backend clones what an op may change (use "
            "inductor or eager)"
        )
    elif result == _NO_LANE:
        detail = (
            "more streams run the model than there are lanes, so this pass was not recorded: "
            "attach(model, lanes=N) with as many lanes as streams"
        )
    report_fault(site, _FAULTS[result], detail)


def _stream_of(tensor: torch.Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _route_ids(ids: torch.Tensor, site: torch.Tensor) -> None:
    if ids.dim() != 2:
        ids = ids.reshape(-1, ids.shape[-1]) if ids.dim() > 2 else ids.reshape(-1, 1)
    id_bytes = _ID_BYTES.get(ids.dtype)
    if id_bytes is None:
        report_fault(
            site,
            _C.Fault.UNSUPPORTED_DTYPE,
            f"expert ids of dtype {ids.dtype}; int16, int32 or int64 are recorded",
        )
        return
    if site.device != ids.device:
        _refused(_COPIED, ids, site)
        return
    rows, k = ids.shape
    row_stride, slot_stride = ids.stride()
    call = (site.data_ptr(), ids.data_ptr(), id_bytes, rows, k, row_stride, slot_stride)
    again = _in_backward() != -1
    result = (
        _C.launch_ids(*call, again, _stream_of(ids)) if ids.is_cuda else _record_ids(*call, again)
    )
    if result < 0:
        _refused(result, ids, site)


def _map_impl(routing_map: torch.Tensor, site: torch.Tensor, *, packed: bool) -> None:
    if routing_map.dim() != 2:
        routing_map = routing_map.reshape(-1, routing_map.shape[-1])
    if routing_map.dtype != torch.uint8 and (packed or routing_map.dtype != torch.bool):
        wanted = "uint8" if packed else "bool or uint8"
        report_fault(
            site,
            _C.Fault.UNSUPPORTED_DTYPE,
            f"routing map of dtype {routing_map.dtype}; {wanted} is recorded",
        )
        return
    if site.device != routing_map.device:
        _refused(_COPIED, routing_map, site)
        return
    rows, columns = routing_map.shape
    row_stride, column_stride = routing_map.stride()
    call = (
        site.data_ptr(),
        routing_map.data_ptr(),
        packed,
        rows,
        columns,
        row_stride,
        column_stride,
    )
    again = _in_backward() != -1
    result = (
        _C.launch_map(*call, again, _stream_of(routing_map))
        if routing_map.is_cuda
        else _record_map(*call, again)
    )
    if result < 0:
        _refused(result, routing_map, site)


def _route_map(routing_map: torch.Tensor, site: torch.Tensor) -> None:
    _map_impl(routing_map, site, packed=False)


def _route_bits(routing_map: torch.Tensor, site: torch.Tensor) -> None:
    _map_impl(routing_map, site, packed=True)


def _elsewhere(tensor: torch.Tensor, site: torch.Tensor) -> None:
    report_fault(
        site,
        _C.Fault.UNSUPPORTED_DEVICE,
        f"a router on {tensor.device}: CPU and CUDA tensors are recorded",
    )


def _fake(*tensors: torch.Tensor) -> None:
    return None


def _extraction_failed(site: torch.Tensor) -> None:
    report_fault(site, _C.Fault.INTERNAL, "reading the router's choice failed while compiling")


# Reading a tensor's address and shape through DLPack's C interface (torch 2.10 and later) takes a
# fraction of what the same look-ups take in Python; without it the Python bodies serve alone.
_reads_tensors = hasattr(torch.Tensor, "__dlpack_c_exchange_api__") and _C.use_torch(
    torch.Tensor.__dlpack_c_exchange_api__,
    torch.Tensor,
    _in_backward,
    torch._C._len_torch_dispatch_stack,
    _route_ids,
    _route_map,
    _route_bits,
    _refused,
)
_library = torch.library.Library("dodoco", "DEF")
for _name, _argument, _implementation in (
    ("route_ids", "ids", _C.op_ids if _reads_tensors else _route_ids),
    ("route_map", "routing_map", _C.op_map if _reads_tensors else _route_map),
    ("route_bits", "routing_map", _C.op_bits if _reads_tensors else _route_bits),
):
    _library.define(f"{_name}(Tensor {_argument}, Tensor(a!) site) -> ()")
    _library.impl(_name, _implementation, "CPU")
    _library.impl(_name, _implementation, "CUDA")
    _library.impl(_name, _elsewhere, "CompositeExplicitAutograd")
    _library.impl(_name, _fake, "Meta")
    # Ids have no gradient: skip autograd's boxed fallback, a microsecond a call.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
# What compiled code calls in place of report_fault(), which no compiler can trace.
_library.define("extraction_failed(Tensor(a!) site) -> ()")
_library.impl("extraction_failed", _extraction_failed, "CompositeExplicitAutograd")
_library.impl("extraction_failed", _fake, "Meta")
_library.impl("extraction_failed", torch.library.fallthrough_kernel, "Autograd")

route_ids = torch.ops.dodoco.route_ids.default
route_map = torch.ops.dodoco.route_map.default
route_bits = torch.ops.dodoco.route_bits.default
extraction_failed = torch.ops.dodoco.extraction_failed.default


def _not_direct(tensor: object, site: object) -> bool:
    return False


# direct_*(tensor, site) -> bool: records without torch's dispatcher, which costs more than recording
# (most of all when caches are cold). False where the op must be called instead.
direct_ids = _C.direct_ids if _reads_tensors else _not_direct
direct_map = _C.direct_map if _reads_tensors else _not_direct
direct_bits = _C.direct_bits if _reads_tensors else _not_direct
