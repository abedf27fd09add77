"""Sums over ranks computed by hand, and the lines that the reporter writes."""

import json
from pathlib import Path

import pytest
import torch

from megatron_croc.costs.flops import Work, count_flops
from tests.support.distributed import run_distributed
from tests.support.synthetic import make_batch, make_sample, tiny_run


def reduce_known_numbers(changes: dict) -> dict:
    """Totals of made-up losses and matches, different on each data-parallel rank."""
    from megatron_croc.model.prompt_pool import Replacement
    from megatron_croc.parallel.groups import start_distributed
    from megatron_croc.training.reporting.metrics import StepTotals

    run = tiny_run(**changes)
    pg = start_distributed(run.parallel, seed=1)
    dp, is_first = pg.dp.rank(), pg.pp.rank() == 0
    is_last = pg.pp.rank() == pg.pp.size() - 1
    totals = StepTotals(run, pg)
    for number in range(2):
        samples = [make_sample(run, 4 * dp + 2 * number + i, i) for i in range(2)]
        totals.count_batch(make_batch(run, samples))
    if is_last:
        # Shares of the global means: replica 0 brings 1 + 2, replica 1 brings 10 + 20; of them
        # each context-parallel rank holds its own part.
        scale = 10.0**dp * ((1 / 4, 3 / 4)[pg.cp.rank()] if pg.cp.size() > 1 else 1.0)
        totals.count_losses(
            [
                {"text": torch.tensor(k * scale), "reconstruction": torch.tensor(k * scale / 100)}
                for k in (1.0, 2.0)
            ]
        )
    if is_first:
        for index in ([0, 1, 2], [2, 3, 4 + dp]):  # rank 1 uses row 5 where rank 0 uses 4
            totals.count_replacement(
                Replacement(
                    torch.empty(0),
                    torch.tensor([index]),
                    torch.full((1, 3), 2.0 + dp),
                    0.5 + dp,
                    1.0,
                )
            )
    metrics = totals.reduce(grad_norm=1.5)
    return {
        **vars(metrics),
        "pool_usage": metrics.pool_usage,
        "microbatches": totals.num_microbatches_in_world,
    }


def flops_of(run, samples) -> float:
    """Operations of samples of which every second has an image."""
    num_images = len(samples) // 2
    spans = [run.model.vision_tower.num_visual_tokens] * num_images
    work = Work.from_lengths(
        [len(sample.input_ids) for sample in samples],
        num_labels=sum(int((sample.labels[1:] >= 0).sum()) for sample in samples),
        num_images=num_images,
        span_lengths=spans if run.model.attention_mask_type == "visual" else (),
    )
    return sum(count_flops(run, work).values())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "changes", "dp_size"),
    [
        (1, {}, 1),
        (2, {}, 2),
        (2, dict(tensor_model_parallel_size=2), 1),
        (2, dict(pipeline_model_parallel_size=2), 1),
        (2, dict(context_parallel_size=2), 1),
    ],
    ids=["one", "dp2", "tp2", "pp2", "cp2"],
)
def test_every_number_is_counted_once(world_size, changes, dp_size):
    run = tiny_run()
    samples = [make_sample(run, n, n % 2).tokens for n in range(4 * dp_size)]
    lengths = [len(sample.input_ids) for sample in samples]
    flops = flops_of(run, samples)
    text = {1: 3.0, 2: 33.0}[dp_size]
    for result in run_distributed(reduce_known_numbers, world_size, changes):
        assert result["text_loss"] == pytest.approx(text)
        assert result["reconstruction_loss"] == pytest.approx(text / 100)
        assert result["loss"] == pytest.approx(text + 10 * text / 100)
        assert result["num_tokens"] == sum(lengths)  # padding not counted
        assert result["num_images"] == 2 * dp_size
        assert result["num_samples"] == 4 * dp_size
        assert result["num_cut_samples"] == 0 and result["num_labels"] > 0
        assert result["matched_distance"] == pytest.approx({1: 2.0, 2: 2.5}[dp_size])
        assert result["pool_usage"] == pytest.approx({1: 5, 2: 6}[dp_size] / 32)
        counts = {1: (1, 1, 2, 1, 1, 0), 2: (2, 2, 4, 2, 1, 1)}[dp_size]
        assert result["pool_counts"] == counts + (0,) * 26
        # Two micro-batches of half a second; on rank 1 of two replicas, one and a half.
        assert result["matching_seconds"] == pytest.approx({1: 1.0, 2: 2.0}[dp_size])
        assert result["matching_hidden_seconds"] == pytest.approx(2.0)
        assert result["grad_norm"] == 1.5
        assert result["microbatches"] == 2 * dp_size
        assert result["flops"] == pytest.approx(flops, rel=1e-12)
        if dp_size == 1:
            assert result["imbalance_predicted"] is None
        else:  # each replica's own four samples
            halves = [flops_of(run, samples[:4]), flops_of(run, samples[4:])]
            apart = max(halves) / (sum(halves) / 2) - 1
            assert apart > 0.001
            assert result["imbalance_predicted"] == pytest.approx(apart, rel=1e-9)


def test_sums_keep_their_names_in_the_packed_vector():
    from dataclasses import fields

    from megatron_croc.training.reporting.metrics import StepSums

    names = [entry.name for entry in fields(StepSums) if entry.name != "pool_counts"]
    sums = StepSums(pool_counts=torch.tensor([7.0, 8.0], dtype=torch.float64))
    for number, name in enumerate(names, start=1):
        on_device = torch.tensor(float(number), dtype=torch.float64)
        setattr(sums, name, on_device if number % 2 else float(number))
    vector = sums.pack()
    assert vector.dtype == torch.float64 and vector.shape == (len(names) + 2,)
    back = StepSums.unpack((2 * vector).tolist())  # as an all-reduce over two equal ranks
    assert {name: getattr(back, name) for name in names} == {
        name: 2.0 * number for number, name in enumerate(names, start=1)
    }
    assert back.pool_counts == [14.0, 16.0]


def test_a_step_without_images_has_no_distance(pg_collection):
    from megatron_croc.training.reporting.metrics import StepTotals

    run = tiny_run()
    totals = StepTotals(run, pg_collection)
    totals.count_batch(make_batch(run, [make_sample(run, 0, 0)]))
    metrics = totals.reduce()
    assert metrics.matched_distance is None and metrics.pool_usage == 0.0
    assert metrics.matching_seconds is None and metrics.matching_sample is None
    assert metrics.num_images == 0
    other = StepTotals(tiny_run("finetune"), pg_collection).reduce()
    assert other.reconstruction_loss is None and other.pool_usage is None


def make_metrics(number: int, **changes):
    from megatron_croc.training.reporting.metrics import StepMetrics

    numbers = dict(
        text_loss=3.0 - number / 10,
        reconstruction_loss=0.25,
        loss=5.5 - number / 10,
        num_tokens=100 * number,
        num_images=4,
        num_samples=8,
        flops=1e9,
        grad_norm=1.0 + number,
        matched_distance=8.0,
        matching_seconds=0.25,
        matching_hidden_seconds=1.0,
        pool_counts=(3,) * 16 + (0,) * 16,
        learning_rates={"projector": 1e-3, "prompt_pool": 2e-3},
    )
    return StepMetrics(**{**numbers, **changes})


@pytest.fixture
def reporter(tmp_path: Path):
    return open_reporter(tmp_path)


def open_reporter(tmp_path: Path):
    from megatron_croc.training.build import build_reporter

    run = tiny_run(log_dir=str(tmp_path / "log"), log_interval=2, tensorboard=False)
    return build_reporter(run, train_iters=5, world_size=2)


def rows_of(folder: Path) -> list[dict]:
    return [
        json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()
    ]


def test_one_row_per_interval_and_one_at_the_end(reporter, tmp_path: Path):
    for number in range(1, 6):
        progress = {"consumed_samples": 8 * number, "epochs/chat": number / 4}
        reporter.add_step(number, make_metrics(number), waited=0.0, progress=progress)
    reporter.close()
    rows = rows_of(tmp_path)
    assert [row["iteration"] for row in rows] == [2, 4, 5]
    assert [row["epochs/chat"] for row in rows] == [0.5, 1.0, 1.25]
    assert [row["loss"] for row in rows] == pytest.approx(
        [5.35, 5.15, 5.0]
    )  # means of the interval
    assert [row["consumed_samples"] for row in rows] == [16, 32, 40]
    for row in rows:
        assert row["lr/projector"] == 1e-3 and row["lr/prompt_pool"] == 2e-3
        assert row["pool_usage"] == 0.5 and row["reconstruction_loss"] == 0.25
        assert row["grad_norm"] == 1.0 + row["iteration"]
        assert row["seconds_per_step"] > 0
    # The rates of a row belong together: tokens and samples of the interval over its time.
    tokens = [100 + 200, 300 + 400, 500]
    samples = [16, 16, 8]
    for row, num_tokens, num_samples in zip(rows, tokens, samples, strict=True):
        ratio = row["tokens_per_second"] / row["samples_per_second"]
        assert ratio == pytest.approx(num_tokens / num_samples)
        steps = num_samples / 8
        assert row["samples_per_second"] * row["seconds_per_step"] * steps == pytest.approx(
            num_samples
        )


def test_cut_samples_are_a_count_and_a_share_of_labels(reporter, tmp_path: Path):
    cuts = dict(num_cut_samples=3, num_labels=60, num_labels_lost=20)
    for number in range(1, 5):
        metrics = make_metrics(number, **(cuts if number <= 2 else {}))
        reporter.add_step(number, metrics, waited=0.0)
    reporter.close()
    rows = rows_of(tmp_path)
    assert rows[0]["cut_samples"] == 6 and rows[0]["labels_cut"] == 0.25
    assert "cut_samples" not in rows[1] and "labels_cut" not in rows[1]


def test_tensorboard_shows_what_the_file_says(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from megatron_croc.training.build import build_reporter

    run = tiny_run(log_dir=str(tmp_path / "log"), log_interval=2, tensorboard=True)
    reporter = build_reporter(run, train_iters=4, world_size=2)
    for number in range(1, 5):
        reporter.add_step(number, make_metrics(number), waited=0.0)
    reporter.add_validation(4, make_metrics(4))
    reporter.close()
    events = accumulator.EventAccumulator(str(tmp_path / "log" / "tensorboard")).Reload()
    shown = {
        (event.step, name): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    written = {
        (row["iteration"], name): value
        for row in rows_of(tmp_path)
        for name, value in row.items()
        if name != "iteration"
    }
    assert len(written) > 20
    assert shown == pytest.approx(written, rel=1e-6)


def set_clock(reporter) -> list[float]:
    """Give the reporter a clock that shows element 0 of the returned list."""
    now = [0.0]
    reporter.clock = lambda: now[0]
    return now


def test_waiting_for_data_is_a_share_of_the_interval(reporter, tmp_path: Path):
    now = set_clock(reporter)
    reporter.restart_clock()
    for number, now[0] in ((1, 5.0), (2, 10.0), (3, 12.0), (4, 14.0)):
        reporter.add_step(number, make_metrics(number), waited=1.0)
    first, second = rows_of(tmp_path)
    assert first["data_wait_share"] == pytest.approx(2.0 / 10.0)
    assert second["data_wait_share"] == pytest.approx(2.0 / 4.0)
    # 2e9 operations in 10 s on 2 devices.
    assert first["tflops_per_device"] == pytest.approx(1e-4)


def test_matching_is_reported_over_the_interval(reporter, tmp_path: Path):
    from megatron_croc.model.prompt_pool import MatchingSample

    now = set_clock(reporter)
    reporter.restart_clock()
    now[0] = 10.0
    uses = [(8, 8) + (0,) * 30, (0, 0, 16) + (0,) * 29]
    cost = torch.tensor([[1.0, 2.0, 3.0], [1.0, 4.0, 9.0]])  # best 2 + 1; here 1 + 4
    for number, (counts, sample) in enumerate(
        zip(uses, (None, MatchingSample(cost, torch.tensor([0, 1]))), strict=True), start=1
    ):
        metrics = make_metrics(number, pool_counts=counts, matching_sample=sample)
        reporter.add_step(number, metrics, waited=0.0)
        assert all(step.matching_sample is None for step in reporter.interval)  # not piled up
    (row,) = rows_of(tmp_path)
    assert row["pool_usage"] == pytest.approx(3 / 32)
    shares = torch.tensor([0.25, 0.25, 0.5])
    assert row["pool_entropy"] == pytest.approx(-(shares * shares.log2()).sum().item() / 5)
    assert row["matching_seconds_per_step"] == pytest.approx(0.25)
    assert row["matching_share"] == pytest.approx(0.5 / 10)
    assert row["hidden_matching_seconds_per_step"] == pytest.approx(1.0)
    assert row["hidden_matching_share"] == pytest.approx(2.0 / 10)
    assert row["matching_gap"] == pytest.approx((5 - 3) / 3)


@pytest.mark.parametrize(
    ("changes", "num_used", "remedy"),
    [
        (dict(pool_init="randn"), 13, "--pool-init unit"),
        (dict(pool_init="unit", assign_mode="nearest"), 2, "--assign-mode hungarian"),
        (dict(pool_init="unit"), 12, "--pool-size"),
        (dict(pool_init="randn"), 16, None),  # more than 1.25 * 12
        (dict(pool_init="randn", pool_size=15), 12, None),  # no room to spread
    ],
)
def test_a_collapse_of_the_pool_is_warned_of_once(changes, num_used, remedy, caplog):
    from megatron_croc.training.build import build_reporter

    run = tiny_run(log_interval=1, **changes)
    assert run.model.num_replaced_tokens == 12
    size = run.model.prompt_pool.pool_size
    counts = [0] * size
    for token in range(8 * 12):
        counts[token % num_used] += 1
    reporter = build_reporter(run, train_iters=9, world_size=1)
    with caplog.at_level("WARNING"):
        reporter.add_step(1, make_metrics(1, pool_counts=(12,) + (0,) * (size - 1)), waited=0.0)
        assert not caplog.messages  # one image says nothing
        for number in (2, 3):
            reporter.add_step(number, make_metrics(1, pool_counts=tuple(counts)), waited=0.0)
    if remedy is None:
        assert not caplog.messages
    else:
        (message,) = caplog.messages
        assert f"8 images used {num_used} of 32 pool tokens" in message and remedy in message


def test_entropy_is_one_for_equal_use_and_zero_for_one_row():
    from megatron_croc.training.reporting.metrics import entropy

    assert entropy([3, 3, 3, 3]) == pytest.approx(1.0)
    assert entropy([0, 9, 0]) == entropy([0, 0]) == entropy([5]) == 0.0


def test_validation_has_rows_of_its_own(reporter, tmp_path: Path):
    reporter.add_validation(3, make_metrics(0, reconstruction_loss=None))
    assert rows_of(tmp_path) == [{"iteration": 3, "valid_loss": 5.5, "valid_text_loss": 3.0}]


def test_a_resumed_run_goes_on_in_the_same_file(reporter, tmp_path: Path):
    reporter.add_step(2, make_metrics(2), waited=0.0)
    reporter.close()
    again = open_reporter(tmp_path)
    again.add_step(4, make_metrics(4), waited=0.0)
    assert [row["iteration"] for row in rows_of(tmp_path)] == [2, 4]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch):
    from megatron_croc.training.build import build_reporter

    monkeypatch.setenv("RANK", "1")
    run = tiny_run(log_dir=str(tmp_path / "log"), log_interval=1)
    reporter = build_reporter(run, train_iters=2, world_size=2)
    reporter.add_step(1, make_metrics(1), waited=0.0)
    reporter.close()
    assert not (tmp_path / "log").exists()


def test_validation_averages_losses_and_adds_counts():
    from megatron_croc.training.evaluate import _combine

    steps = [make_metrics(1, grad_norm=None), make_metrics(3, grad_norm=None)]
    combined = _combine(steps)
    assert combined.text_loss == pytest.approx((2.9 + 2.7) / 2)
    assert combined.loss == pytest.approx((5.4 + 5.2) / 2)
    assert combined.reconstruction_loss == pytest.approx(0.25)
    assert (combined.num_tokens, combined.num_samples) == (400, 16)
    assert combined.grad_norm is None
    finetune = [make_metrics(1, reconstruction_loss=None)] * 2
    assert _combine(finetune).reconstruction_loss is None
