"""A second device for machines that have none: the CPU under another name, which refuses what a GPU would refuse.

Every tensor on it is a wrapper around one on the CPU. An operation on tensors of both devices fails, but for those that a GPU allows:
copies, single numbers, and CPU indices into the device's tensors. So code that forgets where its tensors lie fails here as it would there.
"""

from contextlib import contextmanager

import torch
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "second"
COPIES = ("copy_", "_to_copy")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")

_setup_privateuseone_for_python_backend(NAME)  # before autograd counts devices: a process imports this first, or never


class Elsewhere(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=torch.device(NAME, 0), **layout)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self):
        return f"Elsewhere({self.inner})"


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextmanager
def second_device():
    """While it lasts, `torch.device("second")` is a device."""
    _device_constructors()  # torch remembers which functions make tensors: they shall be its own
    plain = torch.tensor  # makes its tensor below all modes

    def tensor(data, *, device=None, **options):
        made = plain(data, **options)
        return made if device is None else made.to(device)

    torch.tensor = tensor
    try:
        with _Mode():
            yield torch.device(NAME, 0)
    finally:
        torch.tensor = plain


def _run(func, args, kwargs):
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    there = any(isinstance(value, Elsewhere) for value in tensors)
    here = any(value.device.type == "cpu" and value.ndim for value in tensors)
    name = func.overloadpacket.__name__
    if there and here and name not in COPIES and not (name in INDEXING and isinstance(args[0], Elsewhere)):
        raise RuntimeError(f"{name}: tensors on two devices")
    target = kwargs.get("device")
    goes = there if target is None else torch.device(target).type == NAME
    if target is not None and goes:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if name.endswith("_") and not name.startswith("__"):
        return args[0]
    return tree_map(lambda value: Elsewhere(value) if goes and isinstance(value, torch.Tensor) else value, out)


def _inner(value):
    return value.inner if isinstance(value, Elsewhere) else value
