"""The stream of samples is the same at any layout, resumes anywhere, and survives bad data."""

import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_croc.data import bad_samples, batch_builder, loader
from megatron_croc.data.batch import IGNORE_INDEX, Batch
from megatron_croc.data.batch_builder import pack_multiple
from megatron_croc.data.loader import build_train_loader, build_train_plan, build_valid_loader
from megatron_croc.data.order.row_plan import RowStream
from megatron_croc.data.store.shards import ShardedDataset
from megatron_croc.errors import ConfigError, DataError
from tests.unit.data.small_samples import measure_lengths

NUM_SAMPLES = 22


@pytest.fixture
def dataset(make_dataset):
    return make_dataset(NUM_SAMPLES)


def read_batches(run, count, *, dp_rank=0, dp_size=1, skip=0) -> list[Batch]:
    """The first batches of a rank in a run that stands behind `skip` rows."""
    state = state_after(run, skip)
    with build_train_loader(run, dp_rank=dp_rank, dp_size=dp_size, state=state) as batches:
        return list(itertools.islice(batches, count))


def state_after(run, rows: int):
    stream = RowStream(build_train_plan(run))
    stream.take(rows)
    return stream.state


def samples_of(batches) -> dict[str, list]:
    """Everything about each sample, by name: tokens, labels, replaced sets, pixels."""
    found: dict[str, list] = {}
    for batch in batches:
        cu = batch.mixed_mask.cu_seqlens.tolist()
        for name, begin, end in zip(batch.sample_ids, cu, cu[1:], strict=False):
            inside = (batch.image_starts >= begin) & (batch.image_starts < end)
            found.setdefault(name, []).append(
                (
                    batch.input_ids[begin:end].tolist(),
                    batch.labels[begin:end].tolist(),
                    batch.replaced[inside].tolist(),
                    batch.pixel_values[inside].sum(dim=(1, 2, 3)).tolist(),
                )
            )
    return found


def global_batches(run, count, *, dp_size=1, skip=0):
    """For each optimizer step, what its samples look like, gathered over the ranks."""
    per_step = run.training.global_batch_size // (run.training.micro_batch_size * dp_size)
    ranks = [
        read_batches(run, count * per_step, dp_rank=rank, dp_size=dp_size, skip=skip)
        for rank in range(dp_size)
    ]
    return [
        samples_of(b for rank in ranks for b in rank[step * per_step : (step + 1) * per_step])
        for step in range(count)
    ]


@pytest.mark.parametrize(("dp_size", "micro_batch_size"), [(2, 2), (4, 1), (4, 2), (1, 8), (8, 1)])
def test_global_batches_do_not_depend_on_the_layout(dataset, make_run, dp_size, micro_batch_size):
    reference = global_batches(make_run(dataset, micro_batch_size=2), 4)
    run = make_run(dataset, micro_batch_size=micro_batch_size)
    run.data.num_workers = 3
    assert global_batches(run, 4, dp_size=dp_size) == reference


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resume_at_any_step(dataset, make_run, step):
    run = make_run(dataset)
    whole = global_batches(run, 5)
    assert global_batches(run, 5 - step, dp_size=2, skip=8 * step) == whole[step:]


def test_exactly_once_per_epoch_and_replaced_sets_change(dataset, make_run):
    run = make_run(dataset, micro_batch_size=1, global_batch_size=1)
    epochs = [
        samples_of(read_batches(run, NUM_SAMPLES, skip=epoch * NUM_SAMPLES)) for epoch in (0, 1)
    ]
    names = {ShardedDataset(dataset).read(i).sample_id for i in range(NUM_SAMPLES)}
    for epoch in epochs:
        assert set(epoch) == names
        assert all(len(times) == 1 for times in epoch.values())
    for name in names:
        (first,), (second,) = epochs[0][name], epochs[1][name]
        assert first[0] == second[0]
        assert (first[2] != second[2]) == bool(first[2])  # new sets where there are images


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_workers_change_nothing(dataset, make_run, num_workers):
    run = make_run(dataset)
    reference = read_batches(run, 12)
    run.data.num_workers = num_workers
    for batch, expected in zip(read_batches(run, 12), reference, strict=True):
        assert batch.sample_ids == expected.sample_ids
        assert batch.input_ids.equal(expected.input_ids)
        assert batch.pixel_values.equal(expected.pixel_values)


def test_validation_is_always_the_same(dataset, make_run):
    run = make_run(dataset)
    streams = []
    for _ in range(2):
        with build_valid_loader(run, dp_rank=0, dp_size=1) as batches:
            streams.append(list(itertools.islice(batches, 4)))
    assert [b.sample_ids for b in streams[0]] == [b.sample_ids for b in streams[1]]
    assert streams[0][0].sample_ids == ("set/000000-000000", "set/000000-000001")
    assert all(a.replaced.equal(b.replaced) for a, b in zip(*streams, strict=True))


def test_stages_without_reconstruction_replace_nothing(dataset, make_run):
    run = make_run(dataset)
    run.stage = "finetune"
    assert not any(batch.replaced.any() for batch in read_batches(run, 4))
    run.stage = "pretrain_croc"
    assert any(batch.replaced.any() for batch in read_batches(run, 4))


def test_bad_samples_keep_their_slots(make_dataset, make_run, monkeypatch):
    question = {"from": "human", "value": "<image> what ?"}
    answer = {"from": "gpt", "value": "that"}
    broken = {
        1: ([question, answer], [("jpg", b"no image")]),
        2: ([question], [("jpg", b"no image")]),
        5: ([question, answer], []),
        9: ([{"from": "human", "value": "<image>" * 9}, answer], [("jpg", b"x")] * 9),
    }
    run = make_run(make_dataset(12, name="good"), micro_batch_size=1, global_batch_size=1)
    good = samples_of(read_batches(run, 12))
    run.data.data_path = (make_dataset(12, name="bad", records=broken),)
    warnings = []
    monkeypatch.setattr(bad_samples.logger, "warning", lambda *args: warnings.append(args))
    with build_train_loader(run, dp_rank=0, dp_size=1, state=None) as batches:
        bad = samples_of(itertools.islice(batches, 12))
        assert batches.bad_counts == {"image": 1, "no_answer": 1, "image_marks": 1, "too_long": 1}
    assert [name.split("/")[1] for name in bad] == [name.split("/")[1] for name in good]
    for number in range(12):
        key = f"{number // 5:06d}-{number % 5:06d}"
        ((ids, labels, replaced, pixels),) = bad[f"bad/{key}"]
        if number in broken:
            assert (labels, replaced, pixels) == ([IGNORE_INDEX], [], [])
            assert len(ids) == 1
            assert any(f"bad/{key}" in str(warning[-1]) for warning in warnings)
        else:
            assert (ids, labels, pixels) == tuple(good[f"good/{key}"][0][i] for i in (0, 1, 3))


def test_one_bad_image_does_not_touch_its_micro_batch(make_dataset, make_run):
    messages = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    records = {3: (messages, [("jpg", b"junk")])}
    run = make_run(make_dataset(8, records=records), micro_batch_size=8)
    run.data.image_decoder = "auto"
    (batch,) = read_batches(run, 1)
    assert batch.num_images == batch.pixel_values.shape[0] == len(batch.image_seeds) == 6


def test_too_many_bad_samples_end_the_run(make_dataset, make_run):
    records = {n: ([{"from": "human", "value": "?"}], []) for n in range(0, 120, 20)}
    run = make_run(make_dataset(120, records=records))
    run.data.max_bad_fraction = 0.03
    with (
        build_train_loader(run, dp_rank=0, dp_size=1, state=None) as batches,
        pytest.raises(DataError, match=r"max_bad_fraction = 0\.03.*\n.*sample set/") as caught,
    ):
        for _ in range(60):
            next(batches)
    assert "no_answer" in str(caught.value)


def test_file_system_errors_are_retried_then_raised(dataset, make_run, monkeypatch):
    monkeypatch.setattr(batch_builder, "FIRST_RETRY_SECONDS", 0.0)
    real_read, failures = ShardedDataset.read, itertools.count()

    def flaky(self, index):
        if next(failures) % 3:
            raise OSError(5, "Input/output error")
        return real_read(self, index)

    run = make_run(dataset)
    reference = [batch.sample_ids for batch in read_batches(run, 4)]
    monkeypatch.setattr(ShardedDataset, "read", flaky)
    assert [batch.sample_ids for batch in read_batches(run, 4)] == reference

    def broken(self, index):
        raise TimeoutError(110, "Connection timed out")

    monkeypatch.setattr(ShardedDataset, "read", broken)
    with pytest.raises(OSError, match=r"sample number \d+: 4 reads failed"):
        read_batches(run, 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_of_workers_reach_the_consumer(dataset, make_run, monkeypatch, num_workers):
    def fail(self, index):
        raise ZeroDivisionError

    monkeypatch.setattr(ShardedDataset, "read", fail)
    errors = []
    monkeypatch.setattr(batch_builder.logger, "error", lambda *args: errors.append(args))
    run = make_run(dataset)
    run.data.num_workers = num_workers
    batches = build_train_loader(run, dp_rank=0, dp_size=1, state=None)
    with pytest.raises(ZeroDivisionError):
        next(batches)
    assert "sample number" in errors[0][0]
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_a_hanging_read_does_not_hang_training(dataset, make_run, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(ShardedDataset, "read", lambda self, index: release.wait(30))
    monkeypatch.setattr(loader, "STALL_SECONDS", 0.2)
    begin = time.monotonic()
    with pytest.raises(DataError, match=r"samples number \d+, \d+ .* not ready"):
        next(build_train_loader(make_run(dataset), dp_rank=0, dp_size=1, state=None))
    assert time.monotonic() - begin < 10
    release.set()


def test_reading_ahead_is_bounded_and_close_ends_the_threads(dataset, make_run):
    run = make_run(dataset)
    run.data.num_workers, run.data.prefetch_factor = 2, 3
    before = threading.active_count()
    batches = build_train_loader(run, dp_rank=0, dp_size=1, state=None)
    next(batches)
    assert len(batches._pending) == 6
    batches.close()
    run.data.prefetch_factor = 1
    batches = build_train_loader(run, dp_rank=0, dp_size=1, state=None)
    assert len(batches._pending) == 4  # one step's
    batches.close()
    batches.close()
    assert threading.active_count() == before


def test_rows_are_padded_for_the_layout(dataset, make_run):
    run = make_run(dataset)
    assert pack_multiple(run.parallel, run.training) == 1
    run.parallel.tensor_model_parallel_size = 3
    assert pack_multiple(run.parallel, run.training) == 1
    run.parallel.context_parallel_size = 2
    run.parallel.sequence_parallel = True
    assert pack_multiple(run.parallel, run.training) == 12
    for batch in read_batches(run, 4):
        assert len(batch.input_ids) % 12 == 0
        assert len(batch.input_ids) - int(batch.mixed_mask.cu_seqlens[-1]) < 12
        assert batch.pixel_values.dtype == torch.uint8
    run.training.fp8_format = "hybrid"  # 16 rows on each of 3 x 2 ranks, also a multiple of 12
    assert pack_multiple(run.parallel, run.training) == 96
    run.training.fp8_recipe = "mxfp8"
    assert pack_multiple(run.parallel, run.training) == 192
    run.training.fp8_recipe = "blockwise"  # sequence parallelism gathers blocks of 128 rows a rank
    assert pack_multiple(run.parallel, run.training) == 768
    run.parallel.sequence_parallel = False
    assert pack_multiple(run.parallel, run.training) == 32


def test_impossible_layouts_are_refused(dataset, make_run):
    run = make_run(dataset)
    with pytest.raises(ConfigError, match="global_batch_size = 8 is not a multiple"):
        build_train_loader(run, dp_rank=0, dp_size=3, state=None)
    with pytest.raises(ConfigError, match="dp_rank = 2"):
        build_train_loader(run, dp_rank=2, dp_size=2, state=None)
    run.model.language_model.vocab_size = 100
    with pytest.raises(DataError, match="vocab_size"):
        build_train_loader(run, dp_rank=0, dp_size=1, state=None)


@pytest.mark.parametrize("packing", [False, True])
def test_the_state_of_any_step_leads_to_the_next(dataset, make_run, packing):
    """The loader says where it stands only after whole global batches, however far it read."""
    run = make_run(measured(dataset, make_run), micro_batch_size=1, global_batch_size=4)
    run.data.packing, run.data.num_workers, run.data.prefetch_factor = packing, 2, 4
    whole = global_batches(run, 5, dp_size=1)
    with build_train_loader(run, dp_rank=1, dp_size=2, state=None) as batches:
        before = batches.state
        next(batches)
        assert batches.state == before  # half of the rank's share of the first step
        next(batches)
        state = batches.state
        assert sum(state.consumed) == sum(len(times) for times in whole[0].values())
    run.data.num_workers = 0
    with build_train_loader(run, dp_rank=0, dp_size=1, state=state) as batches:
        again = samples_of(itertools.islice(batches, 4))
    assert again == whole[1]


def measured(folder, make_run):
    """The dataset, with its lengths."""
    data = make_run(folder).data
    measure_lengths(folder, data.tokenizer_model, data.conversation_template)
    return folder


def test_packed_rows_hold_whole_samples_up_to_the_capacity(dataset, make_run):
    run = make_run(measured(dataset, make_run), micro_batch_size=1, global_batch_size=1)
    separate = samples_of(read_batches(run, NUM_SAMPLES))
    run.data.packing, run.data.packing_length = True, 700
    plan = build_train_plan(run)
    packs = read_batches(run, plan.num_packs(NUM_SAMPLES))
    assert len(packs) < NUM_SAMPLES / 2
    assert samples_of(packs) == separate
    for batch in packs:
        assert len(batch.input_ids) <= 700
        assert batch.mixed_mask.num_samples == len(batch.sample_ids)
    assert max(batch.num_images for batch in packs) > 2


@pytest.mark.parametrize("packing", [False, True])
def test_balanced_steps_are_the_same_at_any_layout_and_resume_anywhere(
    dataset, make_run, caplog, packing
):
    """Samples, tokens, replaced sets and pixels: on one replica, on four, and from the middle."""
    run = make_run(measured(dataset, make_run), micro_batch_size=1, global_batch_size=4)
    run.data.packing = packing
    drawn = global_batches(run, 3)
    run.data.balance_replicas = 2
    reference = global_batches(run, 3)
    assert reference != drawn
    assert global_batches(run, 3, dp_size=2) == reference
    assert global_batches(run, 2, dp_size=2, skip=4) == reference[1:]
    assert "steps are composed for at most" not in caplog.text
    assert global_batches(run, 3, dp_size=4) == reference
    assert "balance_replicas=2: steps are composed for at most 2 replicas; the 4" in caplog.text
    if not packing:  # replicas of a step do about the same work
        ranks = [read_batches(run, 2, dp_rank=rank, dp_size=2) for rank in range(2)]
        tokens = [sum(int(b.mixed_mask.cu_seqlens[-1]) for b in batches) for batches in ranks]
        assert max(tokens) / min(tokens) < 1.2


def test_balancing_needs_lengths(dataset, make_run):
    run = make_run(dataset)
    run.data.balance_replicas = 2
    with pytest.raises(
        DataError, match=r"no sample lengths .* balancing need them; run: croc data"
    ):
        build_train_plan(run)


def test_wrong_lengths_are_noticed(dataset, make_run):
    run = make_run(measured(dataset, make_run))
    run.data.packing = True
    (table,) = Path(dataset).glob("lengths-*.npy")
    lengths = np.load(table)
    lengths[:, 0] -= 1
    np.save(table, lengths)
    with pytest.raises(DataError, match=r"sample set/.* its pack was planned for .*data lengths"):
        read_batches(run, 1)


def test_grouped_steps_have_one_modality(dataset, make_run):
    run = make_run(measured(dataset, make_run), micro_batch_size=4, global_batch_size=4)
    run.data.group_by_modality_length = True
    batches = read_batches(run, NUM_SAMPLES // 4)
    kinds = []
    for batch in batches:
        cu = batch.mixed_mask.cu_seqlens
        images = [
            int(((batch.image_starts >= a) & (batch.image_starts < b)).sum())
            for a, b in itertools.pairwise(cu.tolist())
        ]
        kinds.append({n > 0 for n in images})
        assert (cu.diff().diff() <= 0).all()
    assert sum(len(kind) == 2 for kind in kinds) <= 2  # left over, and shared with the next epoch
    assert {True} in kinds and {False} in kinds
