"""torchtitan's Qwen3 mixture of experts in a pipeline: a finding.

Before its first step a pipeline stage of torch runs its layers once on memory that nobody has written, to learn the shapes of what it sends. The experts
count these tokens as they count all, so that the first update of the routing bias, which evens out the experts' loads, is not the one of a single device.
"""
from common import titan
from torchtitan.models.common import CosSinRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.llama3 import _EMBEDDING_INIT, _NORM_INIT, _output_linear_init
from torchtitan.models.qwen3 import _build_qwen3_moe_layers, model_registry
from torchtitan.models.qwen3.model import Qwen3Model

RANKS = 2
DIM, HEAD = 16, 4
ROWS, LENGTH = 2, 8
ACCEPT = ["torchtitan/models/common/moe.py:318"]           # the choice of experts for the tokens that are none: which they are is what is wrong


def small_qwen3():
    spec = model_registry("debugmodel_moe", attn_backend="varlen")
    spec.model = Qwen3Model.Config(
        vocab_size=titan.VOCAB, dim=DIM,
        tok_embeddings=Embedding.Config(num_embeddings=titan.VOCAB, embedding_dim=DIM, param_init=_EMBEDDING_INIT),
        norm=RMSNorm.Config(normalized_shape=DIM, param_init=_NORM_INIT),
        lm_head=Linear.Config(in_features=DIM, out_features=titan.VOCAB, param_init=_output_linear_init(DIM)),
        layers=_build_qwen3_moe_layers(
            n_layers=2, dim=DIM, n_heads=4, n_kv_heads=2, head_dim=HEAD, moe_hidden_dim=8, num_experts=4, top_k=2, attn_backend="varlen",
            moe_comm_backend="standard", rope=CosSinRoPE.Config(dim=HEAD, max_seq_len=LENGTH, theta=1000000.0)))
    return spec


def build(**options):
    return titan.build(small_qwen3(), rows=ROWS, length=LENGTH, chunks=4, **options)


def reference():
    return titan.training(build(), titan.make_batches(ROWS, LENGTH))


def parallel(ref):
    return titan.training(build(checkpoint=ref.checkpoint(), pipeline_parallel_degree=2), ref.batch, reference=False)
