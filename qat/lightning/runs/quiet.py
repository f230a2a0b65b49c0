"""Silence: Lightning's warnings that say nothing about a run are ignored, and its configuration errors become
`UserError`.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from pytorch_lightning.utilities.exceptions import MisconfigurationException

from qat.errors import UserError

QUIET = (
    ".*LeafSpec.*",  # Lightning calls what torch has deprecated
    ".*does not have many workers.*",  # in-memory data is faster without
    ".*logs directory .* exists and is not empty.*",  # a resumed run's, which is continued
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*smaller than the logging interval.*",  # the log has every epoch's values
    ".*recommended to use `self.log.*sync_dist=True.*",  # each process measures on all samples
)


@contextmanager
def calm() -> Iterator[None]:
    """Ignores the warnings in `QUIET`, and raises Lightning's error for wrong settings as a `UserError`."""
    with warnings.catch_warnings():
        for message in QUIET:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        except (MisconfigurationException, RuntimeError) as error:
            # The second is what EarlyStopping raises for a metric that is not logged, and many others for bugs.
            if isinstance(error, RuntimeError) and not str(error).startswith("Early stopping conditioned on metric"):
                raise
            raise UserError(" ".join(str(error).split())) from error
