"""Checks of every kind of part, which plugin authors call in their own tests.

`check_sampler(MySampler(steps=4))` returns None, or raises ProtocolError, which says the law that
is broken, what was seen, and what to change. Checks take seconds, on the CPU and tiny tensors.
"""

from cmkit.testing.adapter import check_adapter
from cmkit.testing.backbone import check_backbone
from cmkit.testing.codec import check_codec
from cmkit.testing.dataset import check_dataset
from cmkit.testing.metric import check_metric
from cmkit.testing.objective import check_objective
from cmkit.testing.package import Verdict, check_manifest, check_package, check_part
from cmkit.testing.precond import check_precond
from cmkit.testing.protocol import ProtocolError, check_fields
from cmkit.testing.rescaler import check_rescaler
from cmkit.testing.sampler import check_sampler
from cmkit.testing.text import check_text
from cmkit.testing.tracker import check_tracker
