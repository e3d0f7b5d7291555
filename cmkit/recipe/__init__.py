"""One TOML file becomes one validated recipe, every default written out. Free of torch."""

from cmkit.recipe.describe import fields, schema
from cmkit.recipe.load import load
from cmkit.recipe.recipe import Recipe
from cmkit.recipe.tables import (
    NAME,
    DenoiserTable,
    SampleTable,
    SearchTable,
    StageTable,
    TeacherTable,
    TrainTable,
    core_tables,
)
from cmkit.recipe.toml import Source

__all__ = [
    "NAME",
    "DenoiserTable",
    "Recipe",
    "SampleTable",
    "SearchTable",
    "Source",
    "StageTable",
    "TeacherTable",
    "TrainTable",
    "core_tables",
    "fields",
    "load",
    "schema",
]
