"""The plugin, against a stand-in of the few names of vLLM that it uses.

tests/ecosystem runs it in vLLM itself.
"""

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.synthetic import tiny_run

MARK = 7


class StandInLlava:
    """vLLM's LLaVA: logits and embeddings that the test knows."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        assert vllm_config.model_config.hf_config.projector_hidden_act == "gelu"

    def _process_image_input(self, image_input: Any) -> torch.Tensor:
        return torch.full((1, 2, 4), 3.0)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return None if hidden_states is None else torch.zeros(2, 10)


class TorchvisionImages:
    """An image processor that resizes with torchvision."""


class StandInInfo:
    ctx = SimpleNamespace(model_config=SimpleNamespace(model="folder"))

    def get_hf_processor(self, **options: object) -> Any:
        return SimpleNamespace(image_processor=TorchvisionImages(), **options)


class StandInProcessor:
    def apply(self, inputs: Any) -> Any:
        return inputs


@pytest.fixture
def vllm(monkeypatch) -> Any:
    registered: dict[str, str] = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    multimodal = SimpleNamespace(register_processor=lambda *_, **__: lambda model: model)
    modules: dict[str, dict[str, Any]] = {
        "vllm": {"ModelRegistry": registry},
        "vllm.config": {"VllmConfig": object},
        "vllm.multimodal": {"MULTIMODAL_REGISTRY": multimodal},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.config": {"MODELS_CONFIG_MAP": {}},
        "vllm.model_executor.models.llava": {
            "LlavaDummyInputsBuilder": object,
            "LlavaProcessingInfo": StandInInfo,
            "LlavaForConditionalGeneration": StandInLlava,
            "LlavaMultiModalProcessor": StandInProcessor,
        },
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "megatron_croc.serving.vllm_model", raising=False)
    return SimpleNamespace(
        registered=registered,
        configs=vars(sys.modules["vllm.model_executor.models.config"])["MODELS_CONFIG_MAP"],
    )


def settings(**generation: object) -> Any:
    return SimpleNamespace(
        hf_config=SimpleNamespace(image_token_index=MARK, projector_hidden_act="gelu_unit_length"),
        generation_config="auto",
        override_generation_config={},
        try_get_generation_config=lambda: generation,
    )


def test_registration_needs_no_trust_flag(vllm):
    from transformers import AutoConfig

    from megatron_croc.serving.vllm_plugin import register

    register()
    register()  # vLLM calls it in every process, and may do so twice
    module, name = vllm.registered["CrocForConditionalGeneration"].split(":")
    assert (module, name) == ("megatron_croc.serving.vllm_model", "CrocForConditionalGeneration")
    assert AutoConfig.for_model("croc").model_type == "croc"


def test_requests_without_a_temperature_get_the_most_likely_token(vllm):
    from megatron_croc.serving.vllm_plugin import GreedyByDefault, register

    register()
    assert vllm.configs == {"CrocForConditionalGeneration": GreedyByDefault}
    for written, given, expected in (
        (dict(do_sample=False), {}, {"temperature": 0.0}),
        (dict(do_sample=True), {}, {}),
        (dict(do_sample=False), {"temperature": 0.7}, {"temperature": 0.7}),
    ):
        config = settings(**written)
        config.override_generation_config = given
        GreedyByDefault.verify_and_update_model_config(config)
        assert config.override_generation_config == expected


def test_unit_length_and_words_that_are_never_generated(vllm):
    from megatron_croc.serving.vllm_model import CrocForConditionalGeneration

    config = SimpleNamespace(model_config=settings(suppress_tokens=[8, 9]))
    model = CrocForConditionalGeneration(vllm_config=config)
    embeddings = model._process_image_input({"type": "pixel_values"})
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(1, 2))
    given = model._process_image_input({"type": "image_embeds"})
    assert float(given.norm(dim=-1)[0, 0]) == 6.0
    logits = model.compute_logits(torch.zeros(1))
    assert logits is not None
    assert logits.isinf().nonzero()[:, 1].unique().tolist() == [MARK, 8, 9]
    assert model.compute_logits(None) is None  # a rank that does not sample


def test_images_are_resized_as_in_training(vllm, tmp_path, monkeypatch):
    from megatron_croc.convert.export_config import processor_configs
    from megatron_croc.serving.vllm_model import CrocProcessingInfo

    run = tiny_run("finetune")
    for name, content in processor_configs(run.model.vision_tower, run.data).items():
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.setattr(StandInInfo.ctx.model_config, "model", str(tmp_path))
    processor = CrocProcessingInfo().get_hf_processor()
    assert type(processor.image_processor).__name__ == "LlavaImageProcessorPil"


def test_marks_without_an_image_are_refused(vllm):
    from megatron_croc.serving.vllm_model import CrocMultiModalProcessor

    processor = CrocMultiModalProcessor()
    processor.info = SimpleNamespace(get_hf_config=lambda: settings().hf_config)
    placed = {"image": [SimpleNamespace(length=2)]}
    good = dict(prompt_token_ids=[1, MARK, MARK, 3], mm_placeholders=placed)
    assert processor.apply(good) == good
    with pytest.raises(ValueError, match="1 <image> mark"):
        processor.apply(good | dict(prompt_token_ids=[1, MARK, MARK, 3, MARK]))
