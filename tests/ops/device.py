"""Runs an op on another device than its tensors', so that one test serves CPU and GPU."""

import dataclasses
import functools
from collections.abc import Callable

import torch


def on_device(implementation: Callable, device: str) -> Callable:
    """The implementation, for tensors on the CPU: whole storages are copied there, with strides, overlaps and what lies
    between, and back afterwards."""

    @functools.wraps(implementation)
    def call(args: tuple) -> object:
        storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

        def there(value: object) -> object:
            if hasattr(value, "_fields"):
                return type(value)(*map(there, value))
            if dataclasses.is_dataclass(value):
                fields = {field.name: there(getattr(value, field.name)) for field in dataclasses.fields(value)}
                return dataclasses.replace(value, **fields)
            if not isinstance(value, torch.Tensor):
                return value
            here = value.untyped_storage()
            if here.data_ptr() not in storages:
                copy = torch.empty(here.nbytes(), dtype=torch.uint8, device=device).untyped_storage()
                copy.copy_(here)
                storages[here.data_ptr()] = here, copy
            copy = storages[here.data_ptr()][1]
            view = torch.empty(0, dtype=value.dtype, device=device)
            return view.set_(copy, value.storage_offset(), value.shape, value.stride())

        results = implementation(there(args))
        for here, copy in storages.values():
            here.copy_(copy)
        return results.cpu() if isinstance(results, torch.Tensor) else tuple(result.cpu() for result in results)

    return call
