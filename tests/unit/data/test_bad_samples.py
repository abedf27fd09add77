"""Bad samples are counted, judged late, and travel between processes."""

import json
import pickle
from collections import Counter

import pytest

from megatron_croc.data.bad_samples import BadSampleBudget, BadSampleError
from megatron_croc.errors import DataError

BAD = BadSampleError("set/0", "image", "broken")


def test_few_samples_are_not_judged():
    budget = BadSampleBudget(0.01)
    budget.record(99, [BAD] * 50)
    with pytest.raises(DataError, match=r"51 of 100 .*image: 51.*max_bad_fraction = 0\.01"):
        budget.record(1, [BAD])


def test_a_small_share_is_put_up_with():
    budget = BadSampleBudget(0.01)
    budget.record(200, [BAD, BAD])
    assert Counter(budget.counts) == {"image": 2}


def test_pickles_whole():
    copy = pickle.loads(pickle.dumps(BAD))
    assert (copy.sample_id, copy.kind, str(copy)) == ("set/0", "image", str(BAD))


def test_report_names_every_bad_sample(tmp_path):
    budget = BadSampleBudget(0.5, report=tmp_path / "new" / "bad.jsonl")
    budget.record(10, [BAD, BadSampleError("a/b/1", "record", "\ud800")])
    lines = [json.loads(line) for line in budget.report.read_text().splitlines()]
    assert [line["sample"] for line in lines] == ["set/0", "a/b/1"]
    assert lines[1]["reason"] == "\\ud800"  # what no log could print is spelled out
    assert budget.source_counts == {"set": 1, "a/b": 1}


def test_nothing_but_bad_samples_ends_a_run_early():
    """Three in a row are no chance at 1 %, two are; at 50 % it takes 17."""
    budget = BadSampleBudget(0.01)
    budget.record(2, [BAD] * 2)
    with pytest.raises(DataError, match=r"all 3 samples .*image: 3; set: 3.* sample set/0: broken"):
        budget.record(1, [BAD])
    budget = BadSampleBudget(0.5)
    budget.record(16, [BAD] * 16)
    with pytest.raises(DataError, match="all 17 samples so far are bad") as caught:
        budget.record(1, [BAD])
    assert "\n" not in str(caught.value)
    budget = BadSampleBudget(0.01)
    budget.record(4, [BAD] * 3)  # one good sample: chance is judged at 100
