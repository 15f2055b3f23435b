"""torchtitan's Trainer on DeepSeek-V3 (latent attention, experts with a routing bias): expert parallel, with FSDP2, with tensor parallel.

Expert parallel borrows its ranks from dp and tp: dp=2, ep=2 is two ranks, dp=4, ep=2 shards each expert over two.
"""
from common import titan
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.deepseek_v3 import (_EMBEDDING_INIT, _NORM_INIT, _build_dsv3_layers, _output_linear_init, model_registry)
from torchtitan.models.deepseek_v3.model import DeepSeekV3Model

RANKS = lambda dp=1, tp=1, ep=1, pp=1: dp * tp * pp
CASES = [{"dp": 2, "ep": 2}, {"dp": 4, "ep": 2}, {"tp": 2, "ep": 2}]
DIM, HEADS = 16, 2
ROWS, LENGTH = 4, 8


def small_deepseek_v3():
    """DeepSeek-V3 with one dense layer and one of four experts, two of which see each token."""
    spec = model_registry("debugmodel", attn_backend="varlen")
    layers = _build_dsv3_layers(
        n_layers=2, n_dense_layers=1, dim=DIM, n_heads=HEADS, q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4,
        v_head_dim=5, mscale=0.7, dense_hidden_dim=20, moe_hidden_dim=8, num_experts=4, num_shared_experts=1, router_top_k=2,
        router_score_func="sigmoid", router_route_norm=True, router_route_scale=2.5, attn_backend="varlen", moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        rope=ComplexRoPE.Config(dim=4, max_seq_len=LENGTH, theta=10000.0, scaling="yarn", rope_factor=40.0, beta_fast=32.0,
                                beta_slow=1.0, original_seq_len=LENGTH // 2))
    spec.model = DeepSeekV3Model.Config(
        vocab_size=titan.VOCAB, dim=DIM,
        tok_embeddings=Embedding.Config(num_embeddings=titan.VOCAB, embedding_dim=DIM, param_init=_EMBEDDING_INIT),
        norm=RMSNorm.Config(normalized_shape=DIM, param_init=_NORM_INIT),
        lm_head=Linear.Config(in_features=DIM, out_features=titan.VOCAB, param_init=_output_linear_init(DIM)), layers=layers)
    return spec


def build(**options):
    return titan.build(small_deepseek_v3(), length=LENGTH, chunks=4, **options)


def reference():
    return titan.training(build(rows=ROWS), titan.make_batches(ROWS, LENGTH))


def parallel(ref, dp=1, tp=1, ep=1, pp=1):
    trainer = build(rows=ROWS // dp, checkpoint=ref.checkpoint(), global_rows=ROWS, data_parallel_shard_degree=dp,
                    tensor_parallel_degree=tp, expert_parallel_degree=ep, pipeline_parallel_degree=pp)
    return titan.training(trainer, ref.batch, reference=False)
