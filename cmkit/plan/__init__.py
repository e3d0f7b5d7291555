"""A recipe whose parts are known to fit each other, with what it will cost, and the networks built
from it. Every check happens here, before any heavy work."""

from cmkit.plan.checks import (
    CURES,
    check_disk,
    conditions_of,
    cut_note,
    sigma_data_note,
    traits_of,
)
from cmkit.plan.data import batches, cache_bytes, kept
from cmkit.plan.fit import check_fit, plan
from cmkit.plan.networks import (
    attach,
    build,
    build_companions,
    build_teacher,
    built,
    coding_of,
    for_sampling,
    load_start,
    model_digest,
    naming_table,
    noise_of,
    prompts_of,
    space_of,
    target_is_average,
    tensors_digest,
)
from cmkit.plan.record import Plan
