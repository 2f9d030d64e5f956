"""The checkpoint formats that are recognised by their keys.

Each is known by names that occur in every block, so that one lost tensor does not turn a file into
another kind of file. The key tables stand in the files of the families.
"""

from __future__ import annotations

from featdistill.models.checkpoints.clip import CLIP
from featdistill.models.checkpoints.spec import Format
from featdistill.models.checkpoints.swins import SWIN, SWIN_TIMM, SWIN_V2, SWIN_V2_TIMM
from featdistill.models.checkpoints.unwrap import Unwrapped
from featdistill.models.checkpoints.vits import BEIT, DINOV3, VIT

FORMATS = (CLIP, DINOV3, SWIN, SWIN_TIMM, SWIN_V2, SWIN_V2_TIMM, BEIT, VIT)


def recognise(unwrapped: Unwrapped) -> Format | None:
    """The format of a state dict, by its names alone; None if it is none of ours."""
    return next((f for f in FORMATS if f.recognises(unwrapped.tensors)), None)
