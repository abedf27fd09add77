import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_croc.cli import check
from megatron_croc.cli.doctor import accelerators, environment, installed, machine, memory
from megatron_croc.cli.doctor.command import main
from megatron_croc.errors import ConfigError
from megatron_croc.planning import this_device
from megatron_croc.recipes import get_recipe
from tests.support.distributed import run_distributed


def test_the_report_names_what_will_be_used(capsys, tmp_path):
    assert main(["--recipe", "tiny/pretrain_croc", "--disk", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for subject in ("torch", "megatron-core", "attention", "optimizer", "image decoder", "disk"):
        assert f"  {subject}" in printed
    assert "dense" in printed and "ready; CPU" in printed
    assert list(tmp_path.iterdir()) == []


def test_brief_is_one_line_when_nothing_is_wrong(capsys):
    assert main(["--brief"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_missing_requirement_is_an_error_and_ends_the_report(capsys, monkeypatch):
    monkeypatch.setattr(installed, "REQUIRED", ("torch", "no-such-package"))
    assert main([]) == 1
    printed = capsys.readouterr().out
    assert "X no-such-package" in printed and "pip install no-such-package" in printed
    assert "1 problem(s)" in printed and "  attention  " not in printed


def test_the_unrelated_apex_of_pypi_is_told(monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    finding = installed._optional("apex", "")
    assert finding.level == "warning" and "unrelated" in finding.text


def test_a_package_that_does_not_import_is_told(monkeypatch, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise OSError('undefined symbol: _ZN2at')")
    monkeypatch.syspath_prepend(tmp_path)
    finding = installed._optional("flash-attn", "")
    assert finding.level == "warning" and "undefined symbol" in finding.text


def test_a_backend_that_cannot_run_is_an_error(capsys, monkeypatch):
    def refuse(name, query):
        raise ConfigError(f"--attention-backend {name} cannot run here: no kernels")

    monkeypatch.setattr("megatron_croc.ops.attention.backends.choose_backend", refuse)
    assert main(["--recipe", "tiny/pretrain_croc", "--attention-backend", "flip"]) == 1
    assert "X attention              --attention-backend flip cannot run" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    finding = machine.look_at_disk(blocked / "below", size=2**20)
    assert finding.level == "error" and str(blocked) in finding.text


def test_data_that_is_not_there_is_an_error(capsys, tmp_path):
    words = ["--recipe", "tiny/pretrain_croc", "--data-path", str(tmp_path / "none")]
    assert main([*words, "--tokenizer-model", "none"]) == 1
    assert "X data" in capsys.readouterr().out


def memory_line(capsys, *words: str) -> tuple[int, str]:
    status = main([*words])
    printed = capsys.readouterr().out.splitlines()
    return status, next(line for line in printed if line[2:].startswith("memory "))


def use_gpus(monkeypatch, *gibibytes: float) -> None:
    """Let the memory check see GPUs of these sizes."""
    gpus = [SimpleNamespace(name="Test GPU", total_memory=int(n * 2**30)) for n in gibibytes]
    monkeypatch.setattr(memory, "has_cuda", lambda: True)
    monkeypatch.setattr(this_device, "has_cuda", lambda: True)
    monkeypatch.setattr(memory.torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(memory.torch.cuda, "get_device_properties", lambda n: gpus[n])


def test_a_run_is_compared_with_the_ram_of_a_cpu(capsys, monkeypatch):
    ram = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 4 * 2**18}
    monkeypatch.setattr(this_device.os, "sysconf", ram.__getitem__)
    words = ["--recipe", "tiny/pretrain_croc", "--world-size"]
    status, line = memory_line(capsys, *words, "1")
    assert status == 0 and " fits on the CPU: needs 1.0 of 4.0 GiB" in line
    status, line = memory_line(capsys, *words, "8")  # they share it
    assert status == 1 and line.startswith("X memory")
    assert "over 8 processes: needs 1.0 of 0.5 GiB" in line and "croc check --gpu" in line
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of 8 processes, two run here
    assert memory_line(capsys, *words, "8")[0] == 0


def test_a_run_is_compared_with_the_smallest_gpu(capsys, monkeypatch):
    words = ["--recipe", "croc_7b/pretrain_croc", "--micro-batch-size", "4"]
    use_gpus(monkeypatch, 80, 80, 79, 80)
    status, line = memory_line(capsys, *words)
    assert status == 0
    assert "a run of 4 process(es) fits on Test GPU: needs " in line and " of 79.0 GiB" in line
    use_gpus(monkeypatch, *[48] * 4)
    status, line = memory_line(capsys, *words)
    assert status == 1 and line.startswith("X memory") and "does not fit on Test GPU" in line
    flags = line.partition("-> it fits with ")[2].split()
    assert flags == ["--tensor-model-parallel-size", "4", "--micro-batch-size", "2"]
    assert memory_line(capsys, *words, *flags)[0] == 0


def test_check_and_doctor_give_the_same_figures(capsys, monkeypatch):
    words = ["--recipe", "croc_7b/pretrain_croc", "--world-size", "16", "--text-tokens", "300"]
    use_gpus(monkeypatch, *[80e9 / 2**30] * 8)
    figures = memory_line(capsys, *words)[1].partition("needs")[2].partition(")")[0]
    assert figures
    check.main(words)
    assert f"fits on h100: needs{figures})" in capsys.readouterr().out


def test_processes_are_a_whole_copy_of_the_model(capsys, monkeypatch):
    use_gpus(monkeypatch, *[80] * 8)
    words = ["--recipe", "croc_7b/pretrain_croc", "--pipeline-model-parallel-size", "8"]
    assert "a run of 16 process(es)" in memory_line(capsys, *words)[1]  # TP 2 x PP 8
    status, line = memory_line(capsys, *words, "--world-size", "8")
    assert status == 0 and line.startswith("- memory") and "not compared: 1 fault(s)" in line


def test_the_doctors_own_example_need_not_fit(capsys, monkeypatch):
    use_gpus(monkeypatch, 8, 8)
    status, line = memory_line(capsys)
    assert status == 0 and line.startswith("- memory") and "does not fit" in line


def _look(rank_of_fault: int) -> list[list[str]]:
    """The network as it is, then with other sources on one rank, then with a link that errs."""
    import torch.distributed as dist

    from megatron_croc.config.parallel import ParallelConfig
    from megatron_croc.parallel.groups import start_torch

    start_torch(ParallelConfig())
    faulty = dist.get_rank() == rank_of_fault
    reports = [_report()]
    if faulty:
        machine._source_digest = lambda: "another"
    reports.append(_report())
    machine._source_digest = lambda: "the same"
    real = dist.all_reduce

    def erring(tensor):
        real(tensor)
        tensor[7] += 1

    if faulty:
        dist.all_reduce = erring
    reports.append(_report())
    return reports


def _report() -> list[str]:
    return [f"{f.level} {f.subject}: {f.text}" for f in machine.look_at_network(sizes=(2**20,))]


@pytest.mark.distributed
def test_network_faults_are_found_and_their_rank_named():
    for fine, software, link in run_distributed(_look, 2, 1):
        assert [line.split()[0] for line in fine] == ["ok"] * 3
        assert software[0].startswith("error megatron_croc differs") and "[1]" in software[0]
        assert link[1] == "error all-reduce 1 MiB: 1 wrong sums, on ranks [1]"


@pytest.fixture
def make_package(tmp_path, monkeypatch):
    """Make a package that can be imported for the length of a test."""
    before = set(sys.modules)

    def make(module: str, version: str) -> None:
        path = tmp_path
        for part in module.split("."):
            path /= part
            path.mkdir()
            (path / "__init__.py").write_text(f"__version__ = {version!r}\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield make
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(("version", "level"), [("2.9.0", "ok"), ("2.7.0", "warning")])
def test_an_unknown_transformer_engine_is_told(make_package, version: str, level: str):
    make_package("transformer_engine.pytorch.optimizers", version)
    finding = installed._optional("transformer-engine", "fused layers")
    assert finding.level == level and finding.text.startswith(version)
    assert ("2.8 to 2.20" in finding.text) == (level == "warning")
    adam = accelerators._adam()
    assert adam.text == f"Transformer Engine's FusedAdam {version}"


@pytest.mark.parametrize("module", ["flash_attn_interface", "flash_attn_3.flash_attn_interface"])
def test_flash_attention_3_is_found_under_both_names(make_package, module: str):
    make_package(module, "3.0.0")
    finding = installed._optional("flash-attn-3", "attention")
    assert (finding.level, finding.text) == ("ok", "3.0.0 (attention)")


@pytest.mark.parametrize(
    ("decoder", "level", "text"),
    [("dali", "ok", "DALI"), ("dali_gpu", "ok", "DALI, GPU"), ("pil", "note", "PIL")],
)
def test_the_image_decoder_is_the_one_that_is_used(monkeypatch, decoder, level, text):
    monkeypatch.setattr(accelerators, "resolve_decoder", lambda _: decoder)
    finding = accelerators._images(get_recipe("tiny/pretrain_croc"))
    assert (finding.level, finding.text) == (level, text)


def test_an_image_decoder_that_cannot_run_is_an_error(capsys):
    assert main(["--recipe", "tiny/pretrain_croc", "--image-decoder", "dali_gpu"]) == 1
    assert "X image decoder          image_decoder is dali_gpu, but" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variables", "levels"),
    [
        ({}, ["ok", "warning"]),
        ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "2000"}, ["ok", "ok"]),
        ({"TORCH_FR_BUFFER_SIZE": "2000", "NVIDIA_TF32_OVERRIDE": "0"}, ["ok", "ok"]),
        (
            {"TORCH_FR_BUFFER_SIZE": "0", "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000"},
            ["ok", "warning"],  # torch looks at the first
        ),
        ({"NVIDIA_TF32_OVERRIDE": "1"}, ["warning", "warning"]),
        ({"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}, ["warning", "warning"]),
    ],
)
def test_variables_of_the_environment(monkeypatch, variables: dict, levels: list[str]):
    for name in (*environment.TF32, *environment.FLIGHT_RECORDER):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tf32, recorder = environment.look_at_environment()
    assert [tf32.level, recorder.level] == levels
    assert all(name in str(tf32) for name in variables if variables[name] == "1")


def test_the_launchers_set_the_variables_as_the_doctor_wants_them(monkeypatch):
    script = Path(__file__).parents[3] / "examples" / "launch" / "environment.sh"
    command = ["bash", "-c", f"source {script} && env -0"]
    printed = subprocess.run(command, env={}, capture_output=True, text=True, check=True).stdout
    for line in filter(None, printed.split("\0")):
        monkeypatch.setenv(*line.split("=", 1))
    for finding in environment.look_at_environment():
        assert finding.level == "ok"
    assert all(name in os.environ for name in environment.FLIGHT_RECORDER)
