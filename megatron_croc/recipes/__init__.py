"""Named runs: each recipe is a function that returns a complete RunConfig for one stage.

    get_recipe("croc_7b/pretrain_croc")

A recipe is named by its function and the stage. A variant calls a base and changes fields.
"""

from collections.abc import Callable

from megatron_croc.config.base import nearest
from megatron_croc.config.run import RunConfig, Stage
from megatron_croc.errors import ConfigError
from megatron_croc.recipes.croc import croc_7b, croc_13b
from megatron_croc.recipes.stages import STAGES
from megatron_croc.recipes.tiny import tiny
from megatron_croc.recipes.victor import victor_7b

__all__ = ["croc_7b", "croc_13b", "get_recipe", "list_recipes", "tiny", "victor_7b"]

RECIPES: dict[str, tuple[Callable[[Stage], RunConfig], Stage]] = {
    f"{recipe.__name__}/{stage}": (recipe, stage)
    for recipe in (tiny, croc_7b, croc_13b, victor_7b)
    for stage in STAGES
}
"""Name -> function and stage."""


def list_recipes() -> list[str]:
    """Return all names for `get_recipe`."""
    return list(RECIPES)


def get_recipe(name: str) -> RunConfig:
    """Return a new RunConfig of a named recipe.

    Args:
        name: recipe and stage, as in "croc_7b/pretrain_croc".

    Raises:
        ConfigError: no such recipe; the message has the nearest name.
    """
    if name not in RECIPES:
        raise ConfigError(
            f"--recipe {name}: there is no recipe of this name{nearest(name, RECIPES)}; "
            f"choose from {', '.join(RECIPES)}"
        )
    recipe, stage = RECIPES[name]
    return recipe(stage)
