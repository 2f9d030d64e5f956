"""Why tensors are left out, in the words of the report; and the names of a text tower."""

from __future__ import annotations

MASK = "the mask token of the pre-training"
DECODER = "the decoder of the pre-training"
HEAD = "the projection head of the pre-training"
TEACHER = "the frozen teacher of the pre-training"
TEXT = "the text tower"
TEXT_HEAD = "the projection to the text tower's space"

TEXT_TOWER = (
    "transformer.*",
    "token_embedding.*",
    "positional_embedding",
    "ln_final.*",
    "text_projection",
    "text.*",
    "logit_scale",
    "logit_bias",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
)
