"""Croc for vLLM: the entry point `vllm.general_plugins`, called in every process of vLLM.

With it vLLM runs an export with its own kernels, at any tensor-parallel size, without
--trust-remote-code: the configuration class is this package's.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import ModelConfig  # type: ignore[import-not-found]

ARCHITECTURE = "CrocForConditionalGeneration"


def register() -> None:
    """Register the architecture with vLLM, and its configuration with transformers."""
    from transformers import AutoConfig
    from vllm import ModelRegistry  # type: ignore[import-not-found]
    from vllm.model_executor.models.config import (  # type: ignore[import-not-found]
        MODELS_CONFIG_MAP,
    )

    from megatron_croc.convert.remote_code.configuration_croc import CrocConfig

    AutoConfig.register("croc", CrocConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, f"megatron_croc.serving.vllm_model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = GreedyByDefault


class GreedyByDefault:
    """Default of requests without a temperature: the most likely token.

    generation_config.json says `do_sample: false`, which vLLM does not read.
    """

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Set the default temperature to 0, unless the user gave one."""
        if model_config.generation_config == "vllm":
            return
        written = model_config.try_get_generation_config()
        if not written.get("do_sample", False):
            model_config.override_generation_config.setdefault("temperature", 0.0)

    @staticmethod
    def verify_and_update_config(vllm_config: object) -> None:
        """Leave the other settings."""
