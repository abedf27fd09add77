"""Faults are told before work begins, and commands end without a traceback."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from megatron_croc.cli import main as commands
from megatron_croc.cli.main import main


@pytest.fixture
def failing(monkeypatch):
    """Let every command raise an error; SIGINT's handler is restored."""
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def fail_with(error: BaseException) -> None:
        def command(_: object) -> int:
            raise error

        monkeypatch.setattr(commands, "_function", lambda name: command)

    yield fail_with
    signal.signal(signal.SIGINT, handler)


def test_ctrl_c_is_one_line_and_status_130(failing, monkeypatch, capsys):
    failing(KeyboardInterrupt())
    assert main(["generate"]) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"
    failing(KeyboardInterrupt("stopped by Ctrl-C after step 7"))
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C after step 7\n"
    # torchrun starts workers again that end with another status than 0.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    assert main(["train"]) == 0


def test_a_file_without_access_is_one_line(failing, capsys):
    failing(PermissionError(errno.EACCES, "Permission denied", "/some/file"))
    assert main(["data", "demo"]) == 1
    assert capsys.readouterr().err == "error: /some/file: Permission denied\n"
    failing(OSError(errno.EIO, "Input/output error", "/some/file"))  # not the user's to mend
    with pytest.raises(OSError, match="Input/output"):
        main(["data", "demo"])


def test_workers_do_not_start_again_after_an_error_that_no_restart_mends(
    tmp_path: Path, monkeypatch, capsys
):
    told = tmp_path / "error"
    monkeypatch.setenv("CROC_ERROR_FILE", str(told))
    told.touch()  # made empty by the launch script
    words = ["train", "--recipe=tiny/finetune", "--global-batch-size=-1"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "global_batch_size=-1" in error and told.read_text() == error
    assert main(words) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--output", "/proc/nowhere"], "--output /proc/nowhere: cannot be written"),
        (["--output", "HERE/out", "--tokenizer-model", "/nowhere"], "tokenizer_model /nowhere"),
    ],
)
def test_preprocessing_tells_it_before_the_first_shard(tmp_path: Path, capsys, more, told):
    records = tmp_path / "records.json"
    records.write_text(json.dumps([{"caption": "a cat", "id": "1"}]))
    words = [word.replace("HERE", str(tmp_path)) for word in more]
    assert main(["data", "preprocess", "--input", str(records), *words]) == 1
    assert told in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["records.json"]


@pytest.mark.parametrize(
    "words",
    [
        "data demo --num-images 100000 --out /proc/nowhere",
        "data tokenizer --input /nothing.json --output /proc/nowhere/tokenizer.model",
        "data check /nothing --tokenizer-model /nothing --out /proc/nowhere",
        "data inspect --recipe tiny/finetune --data-path /nothing --out /proc/nowhere",
        "data preprocess --input /nothing.json --output /proc/nowhere",
        "convert import --from-hf /proc --save /proc/nowhere",
        "convert export --load /nothing --to /proc/nowhere/export",
    ],
)
def test_an_unwritable_output_is_told_before_the_input_is_read(words: str, capsys):
    assert main(words.split()) == 1
    error = capsys.readouterr().err
    assert "/proc/nowhere: cannot be written" in error
    assert error.startswith("error: --") and error.count("\n") == 1


def test_check_tells_of_folders_and_inputs_for_training(tmp_path: Path, capsys):
    words = ["check", "--recipe=tiny/finetune", "--world-size=1", "--save=/proc/nowhere"]
    words.append("--log-dir=/proc/elsewhere")
    assert main(words) == 0  # not asked for training
    capsys.readouterr()
    assert main([*words, "--for-training"]) == 1
    error = capsys.readouterr().err
    for told in ("save=/proc/nowhere: cannot be written", "log_dir=/proc/elsewhere", "data_path"):
        assert told in error


def test_a_model_larger_than_the_machine_is_told_before_it_is_built(tmp_path, monkeypatch, capsys):
    """7e9 parameters of croc_7b, 18 bytes each, do not fit into eight processes of a laptop."""
    from megatron_croc.planning import this_device
    from megatron_croc.planning.fit import Device

    def laptop(processes: int) -> Device:
        return Device(name="the CPU", memory=16 * 2**30 / processes)

    monkeypatch.setattr(this_device, "this_device", laptop)
    (tmp_path / "tokenizer.model").touch()
    (tmp_path / "data").mkdir()
    words = ["train", "--recipe", "croc_7b/pretrain_croc", "--data-path", str(tmp_path / "data")]
    words += ["--tokenizer-model", str(tmp_path / "tokenizer.model"), "--save", str(tmp_path / "s")]
    words += ["--tensor-model-parallel-size", "1", "--no-sequence-parallel"]
    assert main(words) == 1
    *_, error = capsys.readouterr().err.strip().splitlines()
    # 6.7e9 parameters of the language model alone, 18 bytes each.
    assert "need 11" in error and "GiB in one process, and the CPU has 16.0 GiB" in error, error
    assert "no GPU is in sight" in error
    assert not (tmp_path / "s").exists()
