"""Work of rank 0 alone, whose result or error every rank gets."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from megatron_croc.errors import CrocError
from megatron_croc.log import rank

T = TypeVar("T")


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0; return its result on every rank. Every rank must call it.

    Args:
        action: what rank 0 does; the result must be picklable.

    Raises:
        CrocError: `action` raised it; every rank raises the same, marked as `everywhere`.
    """
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = action()
        except CrocError as error:
            error.everywhere = True
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise cast(CrocError, box[1])
    return cast(T, box[0])
