"""The wheel holds the whole package and nothing else; its command works without the checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("setuptools", minversion="77", reason="setuptools >= 77 builds the wheel")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Installation:
    """A wheel, and an empty folder in which it was installed."""

    wheel: Path
    site: Path

    def run(self, *words: str | Path) -> str:
        """Run a program of this interpreter's environment beside the installed wheel."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.site),
            "PYTHONSAFEPATH": "1",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=self.site,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def croc(self, *words: str | Path) -> str:
        """Run the console script of the wheel."""
        return self.run(self.site / "bin" / "croc", *words)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel of a copy of the sources: building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    sources, site = folder / "sources", folder / "site"
    shutil.copytree(
        ROOT / "megatron_croc",
        sources / "megatron_croc",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in SOURCES:
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(sources)]
    subprocess.run([*pip, *build], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    install = ["install", "--no-deps", "--no-index", "--no-compile", "--target", str(site)]
    subprocess.run([*pip, *install, str(wheel)], check=True, cwd=folder)
    return Installation(wheel=wheel, site=site)


def test_the_wheel_holds_every_file_of_the_package_and_no_other(installed: Installation) -> None:
    package = ROOT / "megatron_croc"
    ours = {
        f"megatron_croc/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(installed.wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == ours


def test_name_and_version(installed: Installation) -> None:
    from megatron_croc import __version__

    assert installed.wheel.name == f"megatron_croc-{__version__}-py3-none-any.whl"
    assert installed.croc("--version").startswith(f"megatron_croc {__version__}\n")


def test_the_wheel_is_imported_and_not_the_checkout(installed: Installation) -> None:
    code = "import megatron_croc.cli.main as main; print(main.__file__)"
    assert installed.run("-c", code).startswith(str(installed.site))


def test_croc_check(installed: Installation) -> None:
    told = installed.croc("check", "--recipe", "croc_7b/pretrain_croc", "--world-size", "8")
    assert "visual tokens of one image          576, 432 of them replaced" in told


def test_croc_plan(installed: Installation) -> None:
    told = installed.croc("plan", "--recipe", "croc_7b/pretrain_croc", "--gpus", "8")
    assert told.splitlines()[-1].startswith("--tensor-model-parallel-size")


def test_croc_convert_inspect(installed: Installation, tmp_path: Path) -> None:
    config = {
        "model_type": "llava_llama",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_projector_type": "mlp2x_gelu",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 16,
        "rms_norm_eps": 1e-6,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": np.zeros((16, 8), np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    told = installed.croc("convert", "inspect", tmp_path)
    assert "model_type llava_llama" in told
    assert "model.embed_tokens.weight  float32   [16, 8]" in told


def test_the_code_that_an_export_carries_is_found(installed: Installation) -> None:
    code = (
        "from importlib.resources import files;"
        "folder = files('megatron_croc.convert.remote_code');"
        "print(sorted(path.name for path in folder.iterdir()))"
    )
    told = installed.run("-c", code)
    assert "configuration_croc.py" in told and "modeling_croc.py" in told
