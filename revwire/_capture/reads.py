"""What a function that returns no tensor tells Python of one: its shape, its values, or what is known before."""

from __future__ import annotations

from typing import Any, Literal

_SHAPE_READS = """
    shape size numel nelement __len__ __iter__ stride is_contiguous storage_offset element_size nbytes itemsize
    is_non_overlapping_and_dense requires_grad is_leaf grad_fn
"""


_FREE_READS = """
    device dtype dim ndim ndimension is_floating_point is_complex is_cuda is_mps is_xpu is_meta is_cpu is_sparse
    is_quantized is_nested is_mkldnn is_xla is_mtia is_maia is_ipu is_vulkan layout get_device is_inference _version
    names is_tensor __hash__ __repr__ __str__ __format__ is_autocast_enabled result_type __dlpack_device__ is_signed
    is_sparse_csr _set_grad_enabled is_same_size
"""


_STATE_CHANGES = """
    requires_grad_ detach_ retain_grad register_hook register_post_accumulate_grad_hook resize_ resize_as_ set_
    share_memory_
"""


_KINDS: dict[str, Literal["shape", "free"]] = {
    **dict.fromkeys(_SHAPE_READS.split(), "shape"),
    **dict.fromkeys(_FREE_READS.split(), "free"),
}


_CHANGES = frozenset(_STATE_CHANGES.split())


def name_of(func: Any) -> str:
    """The name of a torch function; for an attribute, the attribute's."""
    name = str(getattr(func, "__name__", func))
    return str(getattr(func.__self__, "__name__", "")) if name in ("__get__", "__set__") else name


def kind_of(func: Any) -> Literal["shape", "data", "free"]:
    """What a function that returns no tensor tells of its tensors. ``"free"`` is part of every signature, or harmless.

    An unknown function is taken to look at values.
    """
    return _KINDS.get(name_of(func), "data")


def state_change(func: Any) -> str | None:
    """What a function changes about a tensor besides its values, or None."""
    if getattr(func, "__name__", "") == "__set__":
        return f"{name_of(func)} of a tensor"
    return f"{name_of(func)}() of a tensor" if name_of(func) in _CHANGES else None
