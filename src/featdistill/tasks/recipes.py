"""`featdistill recipes`: the named configurations that come with the package."""

from __future__ import annotations

from featdistill.config.commands import RecipesConfig
from featdistill.config.resolve import read_recipe, recipe_names, recipe_text


def run(config: RecipesConfig) -> list[str]:
    """List the recipes, or print one whole."""
    if config.name is not None:
        print(recipe_text(config.name), end="")
        return [config.name]
    names = recipe_names()
    width = max(len(n) for n in names)
    for name in names:
        first = recipe_text(name).splitlines()[0].removeprefix("# ")
        print(f"{name:<{width}}  {read_recipe(name)['command']:<9} {first}")
    print("\nfeatdistill recipes NAME prints one; --recipe NAME uses it")
    return names
