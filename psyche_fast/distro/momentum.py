"""Where delta, DisTrO's momentum, is kept: on the parameters' device, or in host memory."""

from __future__ import annotations

import torch
from torch import Tensor

from psyche_fast.distro.chunks import Layout


class Momentum:
    """Delta, one chunk-major buffer per plan of a layout.

    Args:
        layout: how the parameters are cut.
        offload: keep delta in host memory (pinned where the device is a GPU) and bring one plan's
            at a time to the device, as wide as `Layout`'s `max_elements` lets a plan be. Copies run
            on the device's current stream, in the order of what uses them.
    """

    def __init__(self, layout: Layout, *, offload: bool = False) -> None:
        self._layout, self._offload = layout, offload
        self._buffers = layout.zeros(on_host=offload)
        self._views = layout.views(self._buffers)

    def fetch(self, at: int) -> Tensor:
        """A plan's delta `[chunks, h, w]` on its device; what is changed in it is to be kept."""
        buffer = self._buffers[at]
        if not self._offload:
            return buffer
        return buffer.to(self._layout.plans[at].device, non_blocking=True, copy=True)

    def keep(self, at: int, delta: Tensor) -> None:
        """Takes back what `fetch` gave."""
        if self._offload:
            self._buffers[at].copy_(delta, non_blocking=True)

    def of_parameter(self, position: int) -> Tensor:
        """One parameter's delta in the encoded shape: a view, or a copy on the device."""
        view = self._views[position]
        if not self._offload:
            return view
        return view.to(self._layout.parameters[position].device, copy=True)

    def set(self, position: int, delta: Tensor) -> None:
        """Gives one parameter's delta other values, in any shape."""
        self._views[position].copy_(delta.view(self._views[position].shape))

    def zero(self) -> None:
        """Forgets all."""
        if self._offload and any(plan.device.type == "cuda" for plan in self._layout.plans):
            torch.cuda.current_stream().synchronize()  # copies to the host may be under way
        for buffer in self._buffers:
            buffer.zero_()
