"""The same random draws in two passes, so that dropout does not count as a difference between them."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class RandomState:
    """The state of torch's generators of the CPU and of the CUDA devices among ``devices``, as it is now."""

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._cpu = torch.get_rng_state()
        cuda = {device for device in devices if device.type == "cuda"}
        self._cuda = {device: torch.cuda.get_rng_state(device) for device in cuda}

    def restore(self) -> None:
        """Puts the generators back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
