"""torchtitan's Llama 3.1 405B at its true sizes: its own model, sharded by its own plan of tensor parallelism 8 with sequence parallelism.

    trainverify verify examples/frameworks/torchtitan_llama3_405b.py                                           # small sizes, all values
    trainverify verify examples/frameworks/torchtitan_llama3_405b.py --full-size --case size=405b,layers=126   # true sizes, no memory

Model, RoPE, sharding and vocabulary-parallel loss are torchtitan's; attention is plain causal. There is no data parallelism, so none of FSDP.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torchtitan.components.loss import IGNORE_INDEX, cross_entropy_loss  # noqa: E402
from torchtitan.config import ParallelismConfig  # noqa: E402
from torchtitan.distributed import ParallelDims  # noqa: E402
from torchtitan.distributed.utils import set_spmd_backend  # noqa: E402
from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3 import _EMBEDDING_INIT, _NORM_INIT, _build_llama3_layers, _output_linear_init, compute_ffn_hidden_dim  # noqa: E402
from torchtitan.models.llama3.model import Llama3Model  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402, F401  (the configuration imports it: once here, and not in each rank)

import trainverify as tv  # noqa: E402
from models.llama import random_batch  # noqa: E402

RANKS = 8
SIZES = {"small": {"dim": 96, "n_heads": 16, "n_kv_heads": 8, "hidden_dim": 56},
         "405b": {"dim": 16_384, "n_heads": 128, "n_kv_heads": 8, "hidden_dim": compute_ffn_hidden_dim(16_384, multiple_of=4096, ffn_dim_multiplier=1.2)}}
LENGTHS = {"small": 24, "405b": 8192}
VOCAB = {"small": 48, "405b": 128_256}


def config(size, layers, tp):
    """torchtitan's configuration of Llama 3 at these sizes. Queries, keys and values are three weights, so that parameters are called as in the state dict."""
    sizes, vocab = SIZES[size], VOCAB[size]
    dim = sizes["dim"]
    rope = CosSinRoPE.Config(dim=dim // sizes["n_heads"], max_seq_len=LENGTHS[size], theta=500000)
    model = Llama3Model.Config(
        dim=dim, vocab_size=vocab, norm=RMSNorm.Config(normalized_shape=dim, param_init=_NORM_INIT),
        tok_embeddings=Embedding.Config(num_embeddings=vocab, embedding_dim=dim, param_init=_EMBEDDING_INIT),
        lm_head=Linear.Config(in_features=dim, out_features=vocab, param_init=_output_linear_init(dim)),
        layers=_build_llama3_layers(fuse_qkv=False, n_layers=layers, attn_backend="varlen", rope=rope, **sizes))
    for layer in model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    model.update_from_config(config=SimpleNamespace(parallelism=ParallelismConfig(spmd_backend="partial_dtensor", tensor_parallel_degree=tp)))
    return model


def build(size, layers, tp):
    set_spmd_backend("partial_dtensor")
    with torch.device("meta"):
        model = config(size, layers, tp).build()
    dims = ParallelDims(dp_replicate=1, dp_shard=1, cp=1, tp=tp, pp=1, ep=1, world_size=tp, spmd_backend="partial_dtensor")
    if tp > 1:
        dims.build_mesh()
        model.parallelize(dims)
    model.to_empty(device="cuda")
    with torch.no_grad():
        model.init_states(buffer_device=None)
    return model


def training(model, batch, reference):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, foreach=False)
    tokens, labels = batch["tokens"], batch["labels"]

    def step():
        loss = cross_entropy_loss(model(tokens), labels) / (labels != IGNORE_INDEX).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}

    return tv.Training(model, step, batch=batch if reference else None)


def reference(size="small", layers=2):
    torch.manual_seed(0)
    return training(build(size, layers, 1), random_batch(rows=2, length=LENGTHS[size], vocab=VOCAB[size]), True)


def parallel(ref, size="small", layers=2):
    model = build(size, layers, RANKS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = ref.weights[name]
            if isinstance(parameter, DTensor):
                parameter.to_local().copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local())
            else:
                parameter.copy_(whole)
    return training(model, ref.batch, False)
