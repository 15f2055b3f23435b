"""A configuration for torchtitan's own training script, with which it runs as it is:

    torchrun --nproc-per-node 4 -m torchtitan.train --module examples.scripts.titan_config --config tiny_llama3 \
        --parallelism.data_parallel_shard_degree 2 --parallelism.tensor_parallel_degree 2

It replaces what would need a network (the data set, the tokenizer) or a GPU kernel (FlexAttention: plain causal
attention instead). Only the sizes are tiny.
"""
from dataclasses import dataclass

import torch
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import ParallelismConfig
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import (_EMBEDDING_INIT, _NORM_INIT, _build_llama3_layers, _output_linear_init,
                                      model_registry)
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.models.qwen3 import _build_qwen3_moe_layers
from torchtitan.models.qwen3 import model_registry as qwen3
from torchtitan.models.qwen3.model import Qwen3Model

from examples.models.titan_parts import LENGTH, VOCAB, RowsAtHand, tiny_trainer

ROWS, DIM, HEADS, KV_HEADS, HIDDEN = 6, 24, 4, 2, 20
LAYERS = dict(n_layers=2, dim=DIM, n_heads=HEADS, n_kv_heads=KV_HEADS, fuse_qkv=True, attn_backend="varlen")


class RandomTokens(RowsAtHand):
    """Rows of random tokens, the same ones for any split of a step over ranks and microbatches; rows have different
    numbers of labels that count."""

    @dataclass(kw_only=True, slots=True)
    class Config(RowsAtHand.Config):
        seed: int = 1

    def batches(self):
        generator = torch.Generator().manual_seed(self.config.seed)
        while True:
            tokens = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=generator)
            labels = tokens[:, 1:].clone()
            for row in range(ROWS):
                labels[row, : row % 4] = IGNORE_INDEX
            yield tokens[:, :-1], labels


def trainer_of(spec):
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return tiny_trainer(
        spec, ROWS, dataloader=RandomTokens.Config(), metrics=MetricsProcessor.Config(log_freq=1),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        checkpoint=CheckpointManager.Config(enable=True, interval=1000), activation_checkpoint=None)


def sized(config, layers):
    """A model's configuration at the sizes above."""
    return config(
        dim=DIM, vocab_size=VOCAB, layers=layers,
        tok_embeddings=Embedding.Config(num_embeddings=VOCAB, embedding_dim=DIM, param_init=_EMBEDDING_INIT),
        norm=RMSNorm.Config(normalized_shape=DIM, param_init=_NORM_INIT),
        lm_head=Linear.Config(in_features=DIM, out_features=VOCAB, param_init=_output_linear_init(DIM)))


def tiny_llama3():
    spec = model_registry("debugmodel", attn_backend="varlen")
    rope = ComplexRoPE.Config(dim=DIM // HEADS, max_seq_len=LENGTH, theta=500000, scaling="llama")
    spec.model = sized(Llama3Model.Config, _build_llama3_layers(hidden_dim=HIDDEN, rope=rope, **LAYERS))
    return trainer_of(spec)


def tiny_qwen3_moe():
    """Qwen3's mixture of experts, for all kinds of parallelism in one run: two of four experts see each token."""
    spec = qwen3("debugmodel_moe", attn_backend="varlen")
    rope = CosSinRoPE.Config(dim=DIM // HEADS, max_seq_len=LENGTH, theta=1000000.0)
    spec.model = sized(Qwen3Model.Config, _build_qwen3_moe_layers(
        head_dim=DIM // HEADS, moe_hidden_dim=16, num_experts=4, top_k=2, moe_comm_backend="standard", rope=rope, **LAYERS))
    return trainer_of(spec)
