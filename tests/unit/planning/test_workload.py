"""Distribution of sample lengths, by hand."""

import json

from megatron_croc.planning.workload import Workload, describe


def test_the_line_of_the_planner():
    lengths = tuple(range(0, 200, 2))
    load = Workload(lengths=lengths, images=1.25, peak_tokens=400)
    assert json.loads(describe(load)) == {
        "mean_tokens": 99,
        "median_tokens": 99,
        "p95_tokens": 188,  # 0.95 x 198 = 188.1
        "planned_longest": 400,
        "images": 1.25,
    }
