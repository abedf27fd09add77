import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, socket, sys, time
from megatron_croc.parallel.processes import tie_processes_together
tie_processes_together()
listener = socket.socket(); listener.bind(("127.0.0.1", 0)); listener.listen()
pipe = socket.socketpair()
child = os.fork()
if child == 0:
    kept = []
    for s in (listener, *pipe):
        try:
            os.fstat(s.fileno())
            kept.append(s.family.name)
        except OSError:
            pass
    os.write(1, f"{os.getpid()} {kept}\\n".encode())
    time.sleep(600)
time.sleep(600)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline, f"{pid} outlived its parent"
        time.sleep(0.01)


@pytest.fixture
def parent():
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def test_a_forked_child_holds_no_connection_and_dies_with_its_parent(parent):
    pid, _, kept = parent.stdout.readline().partition(" ")
    assert kept.strip() == "['AF_UNIX', 'AF_UNIX']"  # pipes stay, the listener is closed
    assert is_running(int(pid))
    parent.kill()
    parent.wait()
    wait_until_gone(int(pid))


LAUNCHER = f"""
import os, subprocess, sys, time
os.environ["TORCHELASTIC_RUN_ID"] = "1"
worker = subprocess.Popen([sys.executable, "-c", {SCRIPT!r}], stdout=subprocess.PIPE, text=True)
print(worker.pid, worker.stdout.readline().split()[0], flush=True)
time.sleep(600)
"""


def test_workers_and_their_children_die_with_their_launcher():
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in process.stdout.readline().split()]
    assert all(map(is_running, pids))
    process.kill()
    process.wait()
    for pid in pids:
        wait_until_gone(pid)
