"""The line on the console fits a terminal, and what is unusual has a line of its own."""

import logging

from megatron_croc.training.reporting.console import console_lines

ROW = {
    "iteration": 12000,
    "loss": 8.2225,
    "text_loss": 1.23456,
    "reconstruction_loss": 0.09254,
    "grad_norm": 0.81234,
    "seconds_per_step": 1.4142,
    "samples_per_second": 181.0,
    "tokens_per_second": 212345.0,
    "mfu": 0.412,
    "data_wait_share": 0.01,
    "lr/projector": 1e-3,
    "lr/prompt_pool": 1e-3,
    "time_share/backward": 0.52,
    "time_share/forward": 0.31,
}
CLOCK = "12:00:00 "


def test_a_line_fits_a_terminal() -> None:
    ((level, line),) = console_lines(ROW, 20000, wide=False)
    assert level == logging.INFO
    assert line == (
        "step 12000/20000  text 1.235  recon 0.0925  grad 0.812  lr 1.0e-3  1.41 s/step"
        "  212k tok/s  MFU 41%  3.1 h left"
    )
    assert len(CLOCK + line) <= 120


def test_the_wide_line_has_the_rest() -> None:
    ((_, line),) = console_lines(ROW, 20000, wide=True)
    for part in ("loss 8.2225", "181.0 samples/s", "prompt_pool 1.00e-03", "backward 52%, forward"):
        assert part in line


def test_different_rates_are_a_span() -> None:
    ((_, line),) = console_lines(ROW | {"lr/vision_tower": 2e-5}, 20000, wide=False)
    assert "lr 2.0e-5 to 1.0e-3" in line


def test_skipped_steps_have_their_own_line() -> None:
    for wide in (False, True):
        lines = list(console_lines(ROW | {"skipped_steps": 2}, 20000, wide=wide))
        assert [level for level, _ in lines] == [logging.INFO, logging.WARNING]
        assert "2 steps since the last line were skipped" in lines[1][1]


def test_a_validation_is_one_line() -> None:
    row = {"iteration": 20, "valid_loss": 3.0, "valid_text_loss": 2.5, "valid_answers_right": 0.25}
    ((_, line),) = console_lines(row, 20, wide=False)
    assert line == "step 20/20  validation: text 2.500  answers right 25.0%"
