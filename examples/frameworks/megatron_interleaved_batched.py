"""megatron-core's interleaved pipeline on two ranks with batched messages: a finding.

With two pipeline ranks the previous and the next rank are the same. batch_isend_irecv pairs the messages of two ranks in their
order, and each rank sends to the previous one first and receives from the previous one first: activations arrive as gradients, and gradients as
activations. Megatron's training script refuses these settings; megatron-core takes them, and they are its defaults.
"""
from common.mcore import Layout, checkpoint, training
from megatron_interleaved import LAYERS, reference  # noqa: F401

RANKS = 2


def parallel(ref):
    return training(Layout(pp=2, vpp=2), load=checkpoint(ref.checkpoint()), data=ref.batch, layers=LAYERS, batch_p2p_comm=True, overlap_p2p_comm=False)
