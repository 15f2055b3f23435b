"""A configuration for torchtitan's own training script, with which it runs as it is:

    torchrun --nproc-per-node 4 -m torchtitan.train --module examples.scripts.titan_config --config tiny_llama3 \
        --parallelism.data_parallel_shard_degree 2 --parallelism.tensor_parallel_degree 2

It replaces what would need a network (the data set, the tokenizer) or a GPU kernel (FlexAttention: plain causal
attention instead). Only the sizes are tiny.
"""
import tempfile
from dataclasses import dataclass

import torch
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.config.configs import DebugConfig
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import (_EMBEDDING_INIT, _NORM_INIT, _build_llama3_layers, _output_linear_init,
                                      model_registry)
from torchtitan.models.llama3.model import Llama3Model
from torchtitan.trainer import Trainer

ROWS, VOCAB, LENGTH, DIM, HEADS, KV_HEADS, HIDDEN = 6, 40, 8, 24, 4, 2, 20


class RandomTokens(BaseDataLoader):
    """Rows of random tokens, the same ones for any split of a step over ranks and microbatches; rows have different
    numbers of labels that count."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        seed: int = 1

    def __init__(self, config, *, dp_world_size, dp_rank, local_batch_size, **unused):
        self.seed, self.degree, self.rank, self.rows = config.seed, dp_world_size, dp_rank, local_batch_size

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        positions = torch.arange(LENGTH).expand(self.rows, -1)
        while True:
            tokens = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=generator)
            labels = tokens[:, 1:].clone()
            for row in range(ROWS):
                labels[row, : row % 4] = IGNORE_INDEX
            for part in range(self.rank, ROWS // self.rows, self.degree):
                mine = slice(part * self.rows, (part + 1) * self.rows)
                yield {"input": tokens[mine, :-1], "positions": positions}, labels[mine]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class NoTokenizer(BaseTokenizer):
    """The batches are tokens already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, *, tokenizer_path=None):
        super().__init__()

    def encode(self, *args, **kwargs):
        return []

    def decode(self, *args, **kwargs):
        return ""

    def get_vocab_size(self):
        return VOCAB


def tiny_llama3():
    spec = model_registry("debugmodel", attn_backend="varlen")
    spec.model = Llama3Model.Config(
        dim=DIM, vocab_size=VOCAB,
        tok_embeddings=Embedding.Config(num_embeddings=VOCAB, embedding_dim=DIM, param_init=_EMBEDDING_INIT),
        norm=RMSNorm.Config(normalized_shape=DIM, param_init=_NORM_INIT),
        lm_head=Linear.Config(in_features=DIM, out_features=VOCAB, param_init=_output_linear_init(DIM)),
        layers=_build_llama3_layers(
            fuse_qkv=True, n_layers=2, dim=DIM, n_heads=HEADS, n_kv_heads=KV_HEADS, hidden_dim=HIDDEN,
            attn_backend="varlen",
            rope=ComplexRoPE.Config(dim=DIM // HEADS, max_seq_len=LENGTH, theta=500000, scaling="llama")))
    for layer in spec.model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config = Trainer.Config(
        model_spec=spec, loss=ChunkedLossWrapper.Config(num_chunks=4, loss_fn=CrossEntropyLoss.Config(global_vocab_size=VOCAB)),
        optimizer=default_adamw(lr=1e-2), lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0),
        training=TrainingConfig(local_batch_size=ROWS, seq_len=LENGTH, steps=10, max_norm=0.5, mixed_precision_param="float32",
                                disable_cuda_graphs=True),
        dataloader=RandomTokens.Config(), tokenizer=NoTokenizer.Config(), metrics=MetricsProcessor.Config(log_freq=1),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        checkpoint=CheckpointManager.Config(enable=True, interval=1000), activation_checkpoint=None,
        debug=DebugConfig(seed=1, enable_structured_logging=False), dump_folder=tempfile.mkdtemp())
    config.validator.enable = False
    return config
