"""CPU tensors that say they are on a GPU whose work is done late: only when it is waited for."""

from collections.abc import Callable

from torch import Tensor


class OnDevice(Tensor):
    """A tensor that claims to be on a GPU; copies from it into plain tensors are queued."""

    is_cuda = True
    copies: Callable[[Callable[[], object]], None] | None = None
    """Function that receives copies to be done later; None: copies are done at once."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.copy_ and not isinstance(args[0], cls) and cls.copies is not None:
            target, source = args[0], plain(args[1])
            cls.copies(lambda: target.copy_(source))
            return target
        if func is Tensor.cpu:
            return plain(args[0])
        return super().__torch_function__(func, types, args, kwargs or {})


def on_device(tensor: Tensor) -> Tensor:
    """The same numbers, said to be on a GPU."""
    return tensor.as_subclass(OnDevice)


def plain(tensor: Tensor) -> Tensor:
    """The same numbers on the CPU."""
    return tensor.as_subclass(Tensor)


class LateStream:
    """Work queued in order, none of it done before someone waits for an event behind it."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], object]] = []
        self.num_done = 0

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self) -> "LateEvent":
        return LateEvent(self, len(self.queue))


class LateEvent:
    """A place in a stream."""

    def __init__(self, stream: LateStream, place: int) -> None:
        self.stream, self.place = stream, place

    def synchronize(self) -> None:
        while self.stream.num_done < self.place:
            self.stream.queue[self.stream.num_done]()
            self.stream.num_done += 1
