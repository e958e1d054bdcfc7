"""The logit lens: what each layer would predict if it were the last."""

from __future__ import annotations

from mechlens.analyses.logit_lens.decoders import LastBlocks
from mechlens.analyses.logit_lens.lens import logit_lens
from mechlens.analyses.logit_lens.vector import lens_vector

__all__ = ["LastBlocks", "lens_vector", "logit_lens"]
