"""What goes from the host to the device: several tensors in one pinned buffer and one copy, which nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes, of each tensor in a copy


class Packing:
    """Where each of some tensors lies in one buffer of bytes."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.places, self.size = {}, 0
        for name, tensor in tensors.items():
            self.places[name] = (self.size, tensor.dtype, tensor.shape)
            self.size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT

    def pack(self, tensors: dict[str, Tensor], device: torch.device) -> Tensor:
        """A buffer on the host with the tensors' values; pinned, so that a copy from it does not wait."""
        buffer = torch.empty(self.size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for name, view in self.unpack(buffer).items():
            view.copy_(tensors[name])
        return buffer

    def unpack(self, buffer: Tensor) -> dict[str, Tensor]:
        """Views of a buffer by the tensors' names."""
        views = {}
        for name, (start, dtype, shape) in self.places.items():
            views[name] = buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        return views


def to_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of the host on `device`: all in one copy, which the host does not wait for."""
    if device.type == "cpu":
        return tensors
    packing = Packing(tensors)
    return packing.unpack(packing.pack(tensors, device).to(device, non_blocking=True))
