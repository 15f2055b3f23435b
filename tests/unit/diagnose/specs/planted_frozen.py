"""The same with a learning rate of 0: no wrong update shows."""
import planted
from planted import RANKS, parallel, reference  # noqa: F401

planted.LR = 0.0
