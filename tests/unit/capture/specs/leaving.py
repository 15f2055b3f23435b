"""Numbers that leave tensors and come back, tracked or not."""
import math

import numpy
import torch
from torch import nn

import trainverify as tv

RANKS = 1


def model():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def tracked(m):
    """item() and arithmetic: nothing is lost."""
    n = m.weight.detach().norm().item()
    m.weight.data.mul_(min(1.0, 0.5 / (n + 1e-6)))


def stripped_to_the_same(m):
    """float() strips the origin, the value comes back as it was."""
    m.weight.data.mul_(numpy.float64(m.weight.detach().norm().item()).item())


def stripped(m):
    """A number computed where nobody sees it."""
    m.weight.data.mul_(float(numpy.tanh(m.weight.detach().numpy().sum())))


def data(m):
    """A tensor made of numbers that nobody saw."""
    m.weight.data.add_(torch.tensor(numpy.sort(m.weight.detach().numpy(), axis=None)[:3] * 2.0))


def copied(m):
    """Three weights copied by numpy are weights again, in a number of bytes that is no multiple of 8."""
    print(m.weight.detach().norm().item())
    m.weight.data.add_(torch.from_numpy(m.weight.detach().numpy()[0].copy()))


def eight_bits(m):
    """A number read from an eight bit float."""
    m.weight.data.mul_(float(numpy.tanh(m.weight.detach().to(torch.float8_e5m2).tolist()[0][0])))


def branch(m):
    """A branch on an untracked value."""
    if math.floor(1e6 * float(numpy.abs(m.weight.detach().numpy()).sum())) % 2:
        m.weight.data.mul_(2.0)
    else:
        m.weight.data.add_(1.0)


def routed(m):
    """Integers that a top-k decided steer sizes: the top-k is the reason."""
    m.weight.detach().norm().item()
    order = m.weight.detach().flatten().mul(1e6).fmod(1.0).argsort()
    first = order[:3].tolist()
    for k in range(first[0]):
        m.weight.data.view(-1)[:k + 1].add_(0.5)


def harmless(m):
    """Leaves for a log only."""
    print(m.weight.detach().norm().item(), m.weight.tolist())
    m.weight.data.mul_(0.5)


def nothing(m):
    m.weight.data.mul_(0.5)


def reference():
    m = model()
    return tv.Training(m, lambda: nothing(m))


def parallel(ref, how):
    m = model()
    m.load_state_dict(ref.weights)
    return tv.Training(m, lambda: globals()[how](m))
