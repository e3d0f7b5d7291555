"""One TOML file becomes one validated recipe, every default written out. Free of torch."""

from cmkit.recipe.describe import fields, schema
from cmkit.recipe.load import load
from cmkit.recipe.recipe import Recipe
from cmkit.recipe.tables import (
    CORE_TABLES,
    NAME,
    DenoiserTable,
    SampleTable,
    SearchTable,
    TeacherTable,
    TrainTable,
)
from cmkit.recipe.toml import Source

__all__ = [
    "CORE_TABLES",
    "NAME",
    "DenoiserTable",
    "Recipe",
    "SampleTable",
    "SearchTable",
    "Source",
    "TeacherTable",
    "TrainTable",
    "fields",
    "load",
    "schema",
]
