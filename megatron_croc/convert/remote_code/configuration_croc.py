"""Configuration of Croc: LLaVA's, under a name of its own."""

from transformers import LlavaConfig


class CrocConfig(LlavaConfig):
    """A LLaVA whose projected visual tokens have length 1."""

    model_type = "croc"
