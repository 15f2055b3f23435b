"""Megatron-LM commit 1674ce30b8: a vision encoder taken from transformers is the same on all tensor-parallel ranks, each of which encodes a
part of the image. Its parameters lacked the mark that gradients are to be brought together over these ranks."""
import torch
from kit import HIDDEN, LENGTH, ROWS, TP_SHARDS, Net, SequenceNet, TpMlp, finalize, load, loss_of, make_batch, mark, mesh_of, part, rows_of, single
from kit import clip_sharded, sharded, total, training, valid
from torch import nn

RANKS = 6
BUG = {"id": "A20", "link": "https://github.com/NVIDIA/Megatron-LM/commit/1674ce30b8", "diagnosis": "partial sum",
       "line": "return self.norm(self.project(patches))", "also": ["sum_grads(model.parameters(), dp)", "rest = [p.grad"]}
PIXELS = 7


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.project, self.norm = nn.Linear(PIXELS, HIDDEN), nn.LayerNorm(HIDDEN)

    def forward(self, patches):
        return self.norm(self.project(patches))


def with_encoder(net):
    """A net whose embedding adds the encoding of one patch per position."""

    class Multimodal(net):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.encoder = Encoder()

        def forward(self, tokens, patches):
            self.encoded = self.encoder(patches)
            return super().forward(tokens)

        def hidden(self, x):
            return super().hidden(x + self.encoded)

    return Multimodal


def reference():
    generator = torch.Generator().manual_seed(1)
    batch = {**make_batch(), "patches": torch.randn(ROWS, LENGTH, PIXELS, generator=generator)}
    return single(with_encoder(Net), lambda model, batch: loss_of(model(batch["tokens"], batch["patches"]), batch["labels"]), batch)


def parallel(ref, fixed=False):
    mesh = mesh_of(dp=3, tp=2)
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    model = load(with_encoder(SequenceNet)(tp, mlp=lambda: TpMlp(tp, sequence=True)), ref.weights, tp, TP_SHARDS)
    mark(*model.norm.parameters(), *model.layers[0].norm2.parameters(), model.layers[0].mlp.down.bias, model.embed.weight)
    if fixed:
        mark(*model.encoder.parameters())
    (tokens, labels), patches = rows_of(ref.batch, dp), part(part(ref.batch["patches"], dp), tp, 1)

    def backward():
        loss = loss_of(model(tokens, patches), labels, "sum") / total(valid(labels), dp)
        loss.backward()
        finalize(model, tp, dp)
        return total(loss, dp)

    return training(model, backward, clip=lambda ps: clip_sharded(ps, sharded(model), tp))
