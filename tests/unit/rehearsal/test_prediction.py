"""The predicted step is the later one where there are two: the first does not overlap."""

from megatron_croc.rehearsal.prediction import step_of
from megatron_croc.rehearsal.trace import Compute, Mark
from tests.support.traces import make_traces


def test_events_of_the_step() -> None:
    def part(phase: str, flops: float) -> list:
        return [Mark(phase=phase), Compute(flops=flops)]

    first = [*part("build", 1.0), *part("step", 2.0), *part("gradients", 3.0)]
    later = [*part("later step", 4.0), *part("gradients", 5.0)]
    last = [*part("evaluate", 6.0), *part("save", 7.0)]

    def flops(events: list) -> list[float]:
        trace = make_traces({0: events}, groups={"tp": [[0]]})[0]
        assert all(group.is_ready for group in step_of(trace).header.groups)
        return [event.flops for event in step_of(trace).events if isinstance(event, Compute)]

    assert flops([*first, *last]) == [2.0, 3.0]
    assert flops([*first, *later, *last]) == [4.0, 5.0]
