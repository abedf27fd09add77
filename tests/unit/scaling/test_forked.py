from megatron_croc import __version__
from megatron_croc.scaling import forked


def test_a_command_runs_in_a_process_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(forked, "PRELOADED", ["yaml"])  # torch takes ten seconds
    log = tmp_path / "output.log"
    log.write_text("of the run before\n" * 99)
    assert forked.run_forked(["--version"], log, nice=1) == 0
    assert __version__ in log.read_text() and "before" not in log.read_text()
    assert forked.run_forked(["no-such-command"], log) != 0
    assert "no-such-command" in log.read_text()
