"""torchtitan's Trainer on Llama 3: FSDP2, HSDP, tensor with sequence parallelism, context parallelism, pipelines and accumulation against one device."""
from common import titan
from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.common.attention import FlexAttention
from torchtitan.models.llama3 import _EMBEDDING_INIT, _NORM_INIT, _build_llama3_layers, _output_linear_init, model_registry
from torchtitan.models.llama3.model import Llama3Model

RANKS = lambda replicas=1, dp=1, cp=1, tp=1, pp=1, accumulate=1, schedule="", flex=False, recompute=False: replicas * dp * cp * tp * pp
CASES = [{"dp": 2}, {"tp": 2}, {"dp": 2, "tp": 2}, {"pp": 2}, {"pp": 2, "schedule": "Interleaved1F1B"}, {"dp": 2, "accumulate": 3},
         {"dp": 2, "flex": True, "recompute": True}, {"replicas": 3, "dp": 2}, {"cp": 2}, {"dp": 2, "cp": 2}]
DIM, HEADS, KV_HEADS, HIDDEN = 24, 4, 2, 20
ROWS = 6


def small_llama3():
    """Llama 3 with two layers and grouped-query attention."""
    spec = model_registry("debugmodel", attn_backend="varlen")
    spec.model = Llama3Model.Config(
        dim=DIM, vocab_size=titan.VOCAB,
        tok_embeddings=Embedding.Config(num_embeddings=titan.VOCAB, embedding_dim=DIM, param_init=_EMBEDDING_INIT),
        norm=RMSNorm.Config(normalized_shape=DIM, param_init=_NORM_INIT),
        lm_head=Linear.Config(in_features=DIM, out_features=titan.VOCAB, param_init=_output_linear_init(DIM)),
        layers=_build_llama3_layers(
            fuse_qkv=True, n_layers=2, dim=DIM, n_heads=HEADS, n_kv_heads=KV_HEADS, hidden_dim=HIDDEN, attn_backend="varlen",
            rope=ComplexRoPE.Config(dim=DIM // HEADS, max_seq_len=titan.LENGTH, theta=500000, scaling="llama")))
    return spec


def reference():
    return titan.training(titan.build(small_llama3(), rows=ROWS), titan.make_batches(ROWS))


def parallel(ref, replicas=1, dp=1, cp=1, tp=1, pp=1, accumulate=1, schedule="1F1B", flex=False, recompute=False):
    options = {"attention": FlexAttention} if flex else {}
    trainer = titan.build(small_llama3(), rows=ROWS // replicas // dp // accumulate, checkpoint=ref.checkpoint(), global_rows=ROWS,
                          data_parallel_replicate_degree=replicas, data_parallel_shard_degree=dp, context_parallel_degree=cp,
                          tensor_parallel_degree=tp, pipeline_parallel_degree=pp, pipeline_parallel_schedule=schedule,
                          recompute=FullAC.Config() if recompute else None, **options)
    return titan.training(trainer, ref.batch, reference=False)
