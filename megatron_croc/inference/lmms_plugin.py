"""Croc for lmms-eval: the entry point `lmms_eval.models`, read whenever lmms-eval starts."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]


def manifest() -> "ModelManifest":
    """Return lmms-eval's description of the model `croc`; its class is imported when it is used."""
    from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore[import-not-found]

    return ModelManifest(
        model_id="croc", chat_class_path="megatron_croc.inference.lmms_model.CrocForLmmsEval"
    )
