"""Versions of torch and megatron-core that the rehearsal knows; it replaces parts of both."""

from importlib.metadata import PackageNotFoundError, version

from megatron_croc.config.training import TrainingConfig
from megatron_croc.errors import ConfigError

KNOWN = {"torch": ("2.13",), "megatron-core": ("0.16.1", "0.19.2")}
"""Distribution -> versions, or beginnings of versions, with which it was tried."""


def installed_versions() -> dict[str, str]:
    """Distribution -> version that is installed, or `none`."""
    found = {}
    for name in KNOWN:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def require_known_versions() -> None:
    """Refuse other versions: a rehearsal that replaces the wrong functions proves nothing.

    Raises:
        ConfigError: names the version and those that are known.
    """
    for name, found in installed_versions().items():
        if not any(f"{found}.".startswith(f"{known}.") for known in KNOWN[name]):
            raise ConfigError(
                f"croc rehearse replaces parts of {name} and was tried with "
                f"{' and '.join(KNOWN[name])}, not with {found}; install one of them"
            )


def require_rehearsable(training: TrainingConfig) -> None:
    """Refuse unknown versions, and kernels of Transformer Engine.

    Raises:
        ConfigError: names the version or the setting.
    """
    if training.transformer_impl == "te" or training.fp8_format is not None:
        setting = "transformer_impl=te" if training.fp8_format is None else "fp8_format"
        raise ConfigError(
            f"{setting}: Transformer Engine's kernels cannot be rehearsed; use transformer_impl="
            "local without fp8_format, which has the same weights and communication"
        )
    require_known_versions()
