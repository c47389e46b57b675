"""A graph pass of one's own: batch norms folded into the convolutions before them, so that fewer values are rounded."""

import torch
from torch import fx, nn

import fxquant
from fxquant.graph import info, set_info
from fxquant.program import Pass
from fxquant.qdq import place, put
from fxquant.rewrite import Call, Decline, Match, Rule, Var, apply_rules, aten, fetch


def fold_batch_norm(match: Match) -> fx.Node | Decline:
    conv, training = match["conv"], match["training"]
    if training or len(conv.users) > 1 or conv.args[1].op != "get_attr":
        return Decline("the convolution is read by others, or its weight or the statistics are no constants")

    def value(node):
        return fetch(match.gm, node.target).double()

    weight, bias = conv.args[1], conv.args[2]
    factor = value(match["gamma"]) / (value(match["var"]) + match["eps"]).sqrt()
    shift = value(match["beta"]) - value(match["mean"]) * factor
    if bias is not None:
        shift = shift + value(bias) * factor
    put(match.gm, weight, (value(weight) * factor[:, None, None, None]).float())
    moved = place(match.gm, conv, f"{info(conv).path}.folded_bias", shift.float())
    folded = match.call(aten.conv2d.default, conv.args[0], weight, moved, *conv.args[3:])
    set_info(folded, info(conv))
    return folded


_CONV = Var("conv")
RULES = (  # batch_norm(conv(x, W, b)) -> conv(x, W', b')
    Rule(
        Call(
            aten.batch_norm.default, _CONV, *map(Var, ("gamma", "beta", "mean", "var", "training", "momentum", "eps"))
        ),
        fold_batch_norm,
        where=lambda m: m["conv"].target is aten.conv2d.default,
    ),
)
FOLD_BATCH_NORM = Pass(
    "fold_batch_norm", "batch norms into convolutions", lambda program, settings: apply_rules(program.gm, RULES)
)

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1)).eval()
model[1].running_var.uniform_(0.1, 4)
images = torch.randn(4, 3, 16, 16)

plain = fxquant.compile(model, (images,), "W6A16-E2M3")
folded = fxquant.compile(model, (images,), "W6A16-E2M3", passes=[FOLD_BATCH_NORM])
print(folded.diff("fold_batch_norm"))
with torch.no_grad():
    want = model(images)
for name, compiled in (("as it is", plain), ("folded", folded)):
    error = float((compiled(images) - want).norm() / want.norm())
    print(f"{name}: {len(compiled.program.gm.graph.nodes)} nodes, relative error against float {error:.4f}")
