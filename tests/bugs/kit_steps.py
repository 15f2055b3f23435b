"""Rotary positions, for the specs of class F."""
import torch
import torch.nn.functional as F
from kit import Attention

ROTARY = 4                                  # channels of each head that turn


def rotary_table(length):
    """Cosines and sines of the positions 0 to length - 1: (length, ROTARY / 2) each."""
    angle = torch.arange(length).unsqueeze(-1) * 10_000.0 ** (-torch.arange(0, ROTARY, 2) / ROTARY)
    return angle.cos(), angle.sin()


def rotate(x, table):
    """x: (rows, heads, sequence, head_dim). table: what rotary_table gives, or for each row its own, (rows, 1, sequence, ...)."""
    cos, sin = table
    a, b, rest = x.split([ROTARY // 2, ROTARY // 2, x.shape[-1] - ROTARY], dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


class RotaryAttention(Attention):
    def attend(self, q, k, v):
        q, k = (rotate(t, rotary_table(t.shape[2])) for t in (q, k))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
