"""Families without a key table here: timm's own conversion, held to the same strictness."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from featdistill.core.errors import ModelError
from featdistill.models.checkpoints.tables import Converted
from featdistill.models.checkpoints.unwrap import Unwrapped
from featdistill.models.timm_models import family_filter
from featdistill.models.weights import listed, load_exactly


def fill_by_timm(model: nn.Module, unwrapped: Unwrapped, arch: str, *, what: str) -> Converted:
    """Load a checkpoint by timm's conversion, and account for what it did.

    Raises:
        ModelError: timm cannot read it, or would have to change a tensor's size.
    """
    before = unwrapped.tensors
    carry = family_filter(model)
    try:
        tensors = dict(before) if carry is None else carry(dict(before), model)
    except Exception as error:  # the conversions expect their own family's keys
        odd = _misshapen(before, {k: v for k, v in model.state_dict().items() if k in before})
        shapes = f"; {listed({'of another shape': odd})}" if odd else ""
        raise ModelError(
            f"timm cannot read '{what}' as '{arch}' ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:100]}){shapes}",
            fix="is it a checkpoint of this very architecture?",
        ) from None
    # they stretch positions of another size, or of a damaged shape, in silence
    resampled = {k: v for k, v in tensors.items() if k in before and v.numel() != before[k].numel()}
    if resampled:
        shapes = listed({"of another shape": _misshapen(before, resampled)})
        raise ModelError(
            f"'{what}' does not fit the model: {shapes}",
            fix=f"name the architecture at the size of the file, not '{arch}'; the option image "
            "size carries positions over",
        )
    load_exactly(model, tensors, what=what, strangers=unwrapped.strangers)
    lost = [name for name in before if name not in tensors]
    made = [name for name in tensors if name not in before]
    gone = lost[len(made) :]  # renamed one for one, as far as names can tell
    left_out = {"left out by timm's conversion": gone} if gone else {}
    return Converted(dict(tensors), renamed=len(made), left_out=left_out)


def _misshapen(before: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} {tuple(before[name].shape)} for {tuple(value.shape)}"
        for name, value in wanted.items()
        if before[name].shape != value.shape
    ]
