"""torcheval's base class of metrics, imported without the warnings of that."""

import warnings

with warnings.catch_warnings():
    # torcheval 0.0.7 compiles with torch.jit.script, which torch has deprecated. Whoever imports
    # this cannot change that.
    warnings.simplefilter("ignore", FutureWarning)
    from torcheval.metrics import Metric

__all__ = ["Metric"]
