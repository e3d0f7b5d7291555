"""The recipes that come with cmkit."""

from pathlib import Path

RECIPES = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.toml"))
LATENT = [path for path in RECIPES if "the package cmkit-latent" in path.read_text("utf-8")]
"""Those of parts that cmkit-latent brings, whose tests run them."""
BUILT_IN = [path for path in RECIPES if path not in LATENT]
"""Those of built-in parts alone."""
