"""Packages of the wheel. Name, version and dependencies are in pyproject.toml."""

from setuptools import find_packages, setup

# convert/remote_code, the model code that an export carries along, is a package like the others.
setup(
    packages=find_packages(include=["megatron_croc", "megatron_croc.*"]),
    package_data={  # compiled at their first use
        "megatron_croc.ops.assignment": ["*.cpp"],
        "megatron_croc.rehearsal": ["*.cpp"],
    },
)
