"""Installed packages: versions, and versions that do not fit together."""

import importlib
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from importlib.util import find_spec

from megatron_croc.cli.doctor.finding import Finding
from megatron_croc.libraries import KNOWN

REQUIRED = (
    "torch",
    "megatron-core",
    "numpy",
    "scipy",
    "sentencepiece",
    "webdataset",
    "safetensors",
    "pillow",
)
"""Distributions training does not start without."""

OPTIONAL = {
    "transformer-engine": "fused layers and fp8",
    "apex": "fused Adam without Transformer Engine",
    "flash-attn": "flash-attn 2 under the mixed attention",
    "flash-attn-3": "flash-attn 3 under the mixed attention",
    "triton": "kernels of the attention's flip and of the token assignment",
    "nvidia-dali": "image decoding",
    "transformers": "Hugging Face tokenizers and exports",
    "tensorboard": "curves",
    "wandb": "curves",
}
"""Distribution -> what it is used for."""

_MODULES = {
    "transformer-engine": ("transformer_engine",),
    "flash-attn": ("flash_attn",),  # the package alone, so that one that does not import is seen
    "flash-attn-3": KNOWN["flash-attn-3"].modules,
    "nvidia-dali": ("nvidia.dali",),
}
"""Distribution -> its module, or the modules it may be."""


def look_at_packages() -> Iterator[Finding]:
    """Python, what is required, what is optional."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.machine()}")
    for name in REQUIRED:
        try:
            yield Finding("ok", name, version(name))
        except PackageNotFoundError:
            yield Finding("error", name, "not installed", f"pip install {name}")
    for name, purpose in OPTIONAL.items():
        yield _optional(name, purpose)


def _optional(name: str, purpose: str) -> Finding:
    module = next(filter(_is_there, _MODULES.get(name, (name,))), None)
    if module is None:
        return Finding("ok", name, f"not installed ({purpose})")
    found = version_of(module) or "installed"
    if name == "apex" and not _is_nvidia_apex():
        return Finding(
            "warning",
            name,
            f"{found}: the unrelated package of that name on PyPI",
            "pip uninstall apex; NVIDIA's comes with the NGC image or from its sources",
        )
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken binary package fails in any way it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return Finding(
            "warning",
            name,
            f"{found} does not import: {reason}",
            "it was built for another torch or CUDA: use the image's own, or uninstall it",
        )
    found = version_of(module) or "without a version"  # some only say once they are imported
    known = KNOWN.get(name)
    if known is not None and not known.covers(found):
        return Finding(
            "warning",
            name,
            f"{found}, none of the known versions ({known.range})",
            f"use a known one; otherwise {known.assumed} are taken to be unchanged",
        )
    return Finding("ok", name, f"{found} ({purpose})")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # the parent package is missing, or a stub
        return False


def version_of(module: str) -> str | None:
    """The version of whichever distribution brought a module."""
    from importlib.metadata import packages_distributions

    for name in packages_distributions().get(module.partition(".")[0], []):
        if module != "nvidia.dali" or "dali" in name:
            return distribution(name).version
    return getattr(sys.modules.get(module), "__version__", None)


def _is_nvidia_apex() -> bool:
    return _is_there("apex.optimizers") and _is_there("apex.normalization")
