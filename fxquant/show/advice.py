"""What to do about a decline: advice by what its reason says."""

from __future__ import annotations

import re

ADVICE: tuple[tuple[str, str], ...] = (
    (r"no rule matches this layer", "add a rule that matches its name, or '*' as the last one"),
    (r"rule '.*' keeps it in float", "take keep out of that rule, or put a rule for this layer in front of it"),
    (r"embeddings stay in float unless", "add a rule with its exact path, or with types: [embedding]"),
    (r"its weight is tied to", "name either of the two exactly in a rule; then both are quantized, and stored once"),
    (r"asks for activations only", "give that rule a weight format too"),
    (r"activations are rounded for linears", "nothing; give its rule no activation to be rid of this line"),
    (r"too little data", "give more calibration data: more windows or longer ones, at least as many rows as columns"),
    (r"would be worse than round-to-nearest", "nothing is lost; more data, or a finer group, may change it"),
    (r"(nothing|found nothing) better|nothing was better", "nothing is lost; a finer group or format may help"),
    (r"an embedding looks rows up", "nothing; the method solves for sums, and an embedding has none"),
    (r"groups of channels have inputs", "nothing; round-to-nearest is used, choose a finer format where it matters"),
    (r"which have inputs of their own", "nothing; round-to-nearest is used, or keep the tied layers in float"),
    (r"cannot be scaled for free.*would see it scaled",
     "quantize that reader as well, so that it undoes the scale, or leave this layer out of the method"),
    (r"cannot be scaled for free", "use rotate for this layer, which needs no producer, or leave it out of the method"),
    (r"no multiple of|no power of two above 1 divides", "choose a size that divides the channels"),
    (r"rank \d+ is more than", "give a smaller rank"),
    (r"factors are for linears of their own", "nothing; a finer format for this layer does what factors would"),
    (r"it is multiplied by another activation", "nothing; its scale is for the whole tensor"),
    (r"its channels are of like size already", "nothing is to be gained here"),
    (r"einsum", "write it as nn.Linear or torch.matmul"),
    (r"a float copy stays", "call the layer itself there, or accept the float copy"),
    (r"it drops probabilities at random|is not fixed", "nothing; attention stays in float here"),
    (r"is shared with|has an exponent bias already", "nothing; it is shifted back where it is rounded"),
)  # fmt: skip
"""Pattern of a reason, and what to do."""


def advice(reason: str) -> str | None:
    """What to do about a decline with this reason; None where nothing is known."""
    return next((text for pattern, text in ADVICE if re.search(pattern, reason)), None)
