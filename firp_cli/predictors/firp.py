"""FIRP (arXiv 2410.20488): linear maps that predict the hidden states of k future tokens at one transfer layer.

The states W_i h_n^t of all steps i enter the teacher at layer t together: Hidden Transfer with t_1 = ... = t_k.
"""

from __future__ import annotations

from firp_cli.config import PredictorSection
from firp_cli.predictors.hidden_transfer import HiddenTransferPredictor


class FirpPredictor(HiddenTransferPredictor):
    """W_1..W_k: h~^t_{n+i} = W_i h_n^t runs through the frozen layers t..L-1 and the teacher's head."""

    def _first_config(self, steps: int) -> PredictorSection:
        return self.config.model_copy(update={"steps": steps})
