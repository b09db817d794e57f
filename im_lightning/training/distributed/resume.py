"""Resuming on another number of ranks: Lightning's count of batches, translated.

Our stream resumes at a row, counted over all ranks; Lightning resumes at a *number of batches of one rank*, and ends
the epoch by that number. Batch 3 of 6 on two ranks is batch 6 of 12 on one: left as it stands in the checkpoint, the
count would end an epoch early, and rows would never be trained on.
"""

from __future__ import annotations

import math

from im_lightning._lightning import Trainer
from im_lightning.errors import RequestError, message
from im_lightning.sampling.draws.sampler import QualityWeightedSampler


def translate_batches(trainer: Trainer, sampler: QualityWeightedSampler, batch_size: int, before: int) -> None:
    """Rewrites the batch counts of the checkpoint being restored, which `before` ranks wrote, for this number of ranks.

    Call it while the data module is restored, which is before Lightning restores its loops; the sampler is already at
    the checkpoint's position.

    Raises:
        RequestError: this Lightning keeps its counts elsewhere, so rows would be left out.
    """
    now = sampler.num_replicas
    if before == now:
        return
    try:  # Lightning offers no public way to the checkpoint from a data module
        progress = trainer._checkpoint_connector._loaded_checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        current, finished = progress["current"], progress["is_last_batch"]
        counts = {name: int(current[name]) for name in ("ready", "started", "processed", "completed")}
    except (AttributeError, KeyError, TypeError) as error:
        cause = f"the checkpoint was written by {before} ranks, and its count of batches was not found for these {now}"
        raise RequestError(message("resume", cause, f"resume on {before} ranks")) from error
    batches = math.ceil(len(sampler) / batch_size)
    left = 0 if finished else math.ceil(sampler.remaining() / batch_size)
    moved = batches - left - counts["ready"]
    # One and the same shift: which of them runs ahead of the others tells Lightning where in a batch it was stopped.
    current.update({name: count + moved for name, count in counts.items()})
