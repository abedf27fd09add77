"""A machine with a GPU that no conversion may touch: importing this pretends one."""

import torch


def _cuda(self: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    if self.is_meta:  # as CUDA says it
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    raise AssertionError("a tensor goes to the GPU")


def _compute(*_: object, **__: object) -> None:
    raise AssertionError("the GPU is asked to work")


torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda._lazy_init = _compute
torch.Tensor.cuda = _cuda  # type: ignore[method-assign,assignment]
