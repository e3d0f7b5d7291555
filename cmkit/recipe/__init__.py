"""One TOML file becomes one validated recipe, every default written out. Free of torch."""

from cmkit.recipe.catalog import SUITES, Header, find_recipe, header, shipped
from cmkit.recipe.describe import fields, schema
from cmkit.recipe.grid import cells, minimized, with_values
from cmkit.recipe.keys import run_name, stage_keys, stage_tables
from cmkit.recipe.reading import from_tables, load, load_pipeline
from cmkit.recipe.recipe import Recipe, Teacher
from cmkit.recipe.search_table import SearchTable
from cmkit.recipe.tables import (
    NAME,
    DenoiserTable,
    SampleTable,
    StageTable,
    TrainTable,
    core_tables,
)
from cmkit.recipe.toml import Source
