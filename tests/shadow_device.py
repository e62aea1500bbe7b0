"""A device `shadow` that holds its values on the CPU, and makes the device mistakes of a GPU visible without one.

A tensor on it is a `Shadow`: a subclass with a CPU tensor inside, of which the dispatcher says that it is on `shadow:0`
or `shadow:1`. As on CUDA, tensors of several devices in one operation raise, and so do a CPU tensor that is indexed by
indices of the device, `numpy()`, and a generator of the CPU asked for numbers on the device.

What makes the host wait for the device is counted: `item()`, `tolist()`, `bool()`, copies to the CPU, operations whose
shape depends on values (`nonzero`, boolean indices); and, as "upload", copies from the host that are not
`non_blocking`, after which PyTorch waits for the stream too. Not covered: streams, generators of the device, fused
kernels.

Importing the module registers the device, for the whole process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME, COUNT = "shadow", 2
aten = torch.ops.aten
_COUNTS: list[Counter[str]] = []
_COPIES = {aten.copy_.default, aten._to_copy.default, aten.copy.default}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
_SHAPED = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.bincount.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,
}
_ZERO_DIM = {
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.index_fill.int_Tensor,
    aten.fill_.Tensor,
    aten.index_fill_.int_Tensor,
    aten.index_put.default,
    aten.index_put_.default,
}


_WHOLE = {aten.linear.default, aten.matmul.default}
"""Composite operations that run as they are where nothing is recorded: what they are made of makes no mistake of a
device that they would not make."""


class Shadow(Tensor):
    """A tensor of the shadow device; `held` has its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Shadow:
        if isinstance(held, Shadow):
            return held.detach().requires_grad_(requires_grad)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        made.held = held
        return made

    def numpy(self, **settings: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Copy it to host memory first")

    __array__ = numpy

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        made.__dict__.update({name: value for name, value in self.__dict__.items() if name != "held"})  # a Parameter
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"Shadow({self.held!r}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.scaled_dot_product_attention.default:
            return _attention(*args, **(kwargs or {}))
        if func not in _WHOLE and _composite(func):  # in inference mode these come whole
            return func.decompose(*args, **(kwargs or {}))
        return _run(func, args, kwargs or {})


@cache
def _composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@cache
def _writes(func: Any) -> bool:
    """Whether the first argument is written into."""
    alias = func._schema.arguments[0].alias_info if func._schema.arguments else None
    return alias is not None and alias.is_write


@cache
def _views(func: Any) -> bool:
    """Whether a result may share its memory with an argument."""
    return any(a.alias_info is not None for a in func._schema.arguments)


@cache
def _pointwise(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags or func in _ZERO_DIM


@cache
def _name(func: Any) -> str:
    return func._schema.name.removeprefix("aten::")


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors of arguments, which lie in lists at most: PyTorch's walk over trees is slower."""
    for x in values:
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from _tensors(x)


def _each(kind: type, change: Callable[[Any], Any], x: Any) -> Any:
    """`x` with `change` of each `kind` in it."""
    if isinstance(x, kind):
        return change(x)
    if isinstance(x, (list, tuple)):
        return type(x)(_each(kind, change, y) for y in x)
    return x


def _values(x: Any) -> Any:
    return _each(Shadow, lambda shadow: shadow.held, x)


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """How often the host waits for the device within the block, by the name of the operation."""
    counter: Counter[str] = Counter()
    _COUNTS.append(counter)
    try:
        yield counter
    finally:
        _COUNTS.remove(counter)


def _waited(name: str) -> None:
    for counter in _COUNTS:
        counter[name] += 1


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` on the values, as an operation of the device."""
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    place = _place(func, tensors, args, kwargs)
    _count(func, tensors, args, kwargs, place)
    bare, given = _values(tuple(args)), {name: _values(x) for name, x in kwargs.items()}
    if "device" in given:
        given["device"] = torch.device("cpu")
    given.pop("non_blocking", None)
    out = func(*bare, **given)
    if _writes(func) or "out" in kwargs:
        written = kwargs.get("out", args[0])
        assert not isinstance(written, Shadow) or written.shape == written.held.shape, f"{func} resized its result"
        return written
    if place.type == "cpu":
        return out.clone() if func is aten._to_copy.default else out
    if func is aten._to_copy.default:
        out = out.clone() if any(out is x for x in _tensors(bare)) else out
    # In inference mode a view of a tensor that was made outside of it is not an inference tensor either.
    viewed = _views(func) and not tensors[0].is_inference()
    with torch.inference_mode(torch.is_inference_mode_enabled() and not viewed):
        return _each(Tensor, lambda x: Shadow(x, place), out)


def _place(func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> torch.device:
    """Where the result goes. Raises `RuntimeError` for tensors that CUDA would not take together."""
    asked = kwargs.get("device")
    if func in _COPIES:
        return torch.device(asked) if asked is not None else args[0].device
    held = {x.device for x in tensors if isinstance(x, Shadow)}
    if func in _INDEXING and not isinstance(args[0], Shadow):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    others = [x for x in tensors if not isinstance(x, Shadow)]
    if func in _INDEXING:  # indices may be on the CPU
        others = [x for x in others if not any(x is index for index in args[1])]
    zero = _pointwise(func)
    written = _writes(func) and not isinstance(args[0], Shadow)
    if len(held) > 1 or written or any(x.dim() or not zero for x in others):
        found = ", ".join(sorted({str(x.device) for x in tensors}))
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {found}")
    if (generator := kwargs.get("generator")) is not None and generator.device.type != NAME:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device.type}'")
    place = torch.device(asked) if asked is not None else next(iter(held), torch.device(NAME, 0))
    return place if place.index is not None or place.type == "cpu" else torch.device(NAME, 0)


def _count(func: Any, tensors: list[Tensor], args: Any, kwargs: Any, place: torch.device) -> None:
    name = _name(func)
    if func is aten._local_scalar_dense.default or func in _SHAPED:
        _waited(name)
    elif func in _COPIES:
        source = args[0] if func is aten._to_copy.default else args[1]
        if isinstance(source, Shadow) and place.type == "cpu":
            _waited("to the CPU")
        elif place.type == NAME and source.device.type == "cpu" and not kwargs.get("non_blocking", args[2:] == (True,)):
            _waited("upload")
    elif func in _INDEXING:
        masks = [x for x in args[1] if x is not None and x.dtype in (torch.bool, torch.uint8)]
        filled = len(masks) == len(args[1]) == 1 and len(args) > 2 and args[2].numel() == 1
        if masks and not filled:
            _waited(f"{name} by a mask")


class _Backend(_DummyBackendModule):
    def device_count(self) -> int:
        return COUNT

    def synchronize(self, device: Any = None) -> None:
        """Nothing is ever under way."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


def _created(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Operations without a tensor of the device: those that make one."""
    return _run(func, args, kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch looks for the device's fused kernels, of which there are none."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    return aten._scaled_dot_product_attention_math(
        query, key, value, mask, dropout, causal, scale=scale, enable_gqa=enable_gqa
    )[0]


_setup_privateuseone_for_python_backend(NAME, _Backend())
_ANY = torch.library.Library("_", "IMPL")
_ANY.fallback(_created, "PrivateUse1")
_ATEN = torch.library.Library("aten", "IMPL")
# `torch.tensor` calls these with the dispatch to subclasses switched off, where the fallback is not reached.
_ATEN.impl("_to_copy", lambda *args, **kwargs: _run(aten._to_copy.default, args, kwargs), "PrivateUse1")
_ATEN.impl("_local_scalar_dense", lambda x: _run(aten._local_scalar_dense.default, (x,), {}), "PrivateUse1")
# These would grow an empty tensor, whose size on the outside stays.
for _made in ("arange.start_step", "arange.start", "arange", "linspace", "eye", "eye.m", "randperm.generator"):
    _packet, _, _overload = _made.partition(".")
    _func = getattr(getattr(aten, _packet), _overload or "default")
    _ATEN.impl(_made, partial(_created, _func), "PrivateUse1")
_ATEN.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
