"""What the Megatron examples share: a small GPT, its data, and a training step made of megatron-core's own parts.

The step is the one of Megatron's training loop: forward_backward_func (a pipeline schedule), with finalize_model_grads
behind it, on a DistributedDataParallel; then the optimizer of get_megatron_optimizer, which clips. The reference is the
same code at world size 1; the weights travel through dist_checkpointing, which shards them anew.
"""
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank

import trainverify as tv

LAYERS, HIDDEN, HEADS, GROUPS, HEAD, FFN = 2, 18, 6, 2, 4, 28
VOCAB, LENGTH, ROWS, MICROBATCHES = 40, 6, 2, 4
IGNORE = -1
BUCKET = 1_000                                 # parameters, where reductions overlap: several buckets of gradients
LR, DECAY, CLIP = 1e-2, 0.1, 0.02


@dataclass(frozen=True)
class Layout:
    """How the ranks share the work: those that tp, pp and cp leave are data parallel; experts are shared by ep of the tp x dp ranks, and each by etp.

    overlap: gradients are reduced bucket by bucket while the backward runs, and with the distributed optimizer parameters are gathered
    while the next forward runs.
    """

    tp: int = 1
    pp: int = 1
    vpp: int = 1                               # chunks of layers on each pipeline rank (interleaved schedule)
    cp: int = 1
    ep: int = 1
    etp: int | None = None                     # tensor parallelism within each expert (none: tp)
    sp: bool = False                           # sequence parallelism, with tp
    distributed_optimizer: bool = False
    overlap: bool = False


def config(layout, layers=LAYERS, **more):
    """Llama's layer: grouped queries, RMSNorm, SwiGLU, rotary positions; no two sizes are equal.

    Chunks of an interleaved pipeline exchange messages one by one, as Megatron's training script sets it: see megatron_interleaved_batched.py.
    """
    messages = {"overlap_p2p_comm": layout.vpp > 1, "batch_p2p_comm": layout.vpp == 1}
    return TransformerConfig(
        num_layers=layers, hidden_size=HIDDEN, num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=HEAD, ffn_hidden_size=FFN,
        normalization="RMSNorm", gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0, bias_activation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False, apply_rope_fusion=False, gradient_accumulation_fusion=False,
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp, context_parallel_size=layout.cp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        expert_model_parallel_size=layout.ep, expert_tensor_parallel_size=layout.etp, sequence_parallel=layout.sp,
        pipeline_dtype=torch.float32, params_dtype=torch.float32, use_cpu_initialization=True, **(messages | more))


def batch(length=LENGTH):
    """Microbatches of tokens; no two of them count the same number of labels."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCAB, (MICROBATCHES, ROWS, length + 1), generator=generator)
    tokens[:, 0, :2] = torch.tensor([0, VOCAB - 1])
    labels = tokens[..., 1:].clone()
    for i in range(MICROBATCHES):
        labels[i, i % ROWS, :i + 1] = IGNORE
    return {"tokens": tokens[..., :-1].clone(), "labels": labels}


def chunk_of(cfg, length, stage, tied, engine):
    """This rank's part of the model: the layers of one of its stages (None: it has one)."""
    layers = get_gpt_layer_with_transformer_engine_spec if engine else partial(get_gpt_layer_local_spec, normalization="RMSNorm")
    first, last = (f(ignore_virtual=False, vp_stage=stage) for f in (parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage))
    return GPTModel(cfg, layers(num_experts=cfg.num_moe_experts, moe_grouped_gemm=cfg.moe_grouped_gemm), vocab_size=VOCAB, max_sequence_length=length,
                    pre_process=first, post_process=last, position_embedding_type="rope", share_embeddings_and_output_weights=tied, vp_stage=stage)


def data_parallel(layout, cfg, chunks):
    """The chunks in Megatron's DDP, with what its training loop sets in the configuration for the schedules to call."""
    gather = layout.overlap and layout.distributed_optimizer
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=layout.distributed_optimizer, overlap_grad_reduce=layout.overlap,
                                               overlap_param_gather=gather, bucket_size=BUCKET if layout.overlap else None)
    ddp = [DistributedDataParallel(cfg, ddp_config, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    if layout.overlap:
        no_sync = [chunk.no_sync for chunk in ddp]
        cfg.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    cfg.finalize_model_grads_func = finalize_model_grads
    return ddp


def training(layout=Layout(), load=None, data=None, length=LENGTH, tied=False, engine=False, **more):
    """The training program of this rank. load(chunks) fills in the weights; data is the global batch. The reference makes both itself.

    tied: the head is the embedding; engine: the layers are TransformerEngine's, not Megatron's own.
    """
    if not dist.is_initialized():
        dist.init_process_group("nccl")
    virtual = layout.vpp if layout.vpp > 1 else None
    parallel_state.initialize_model_parallel(layout.tp, layout.pp, virtual, context_parallel_size=layout.cp, expert_model_parallel_size=layout.ep,
                                             expert_tensor_parallel_size=layout.etp)
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    cfg = config(layout, **more)
    chunks = [chunk_of(cfg, length, stage, tied, engine) for stage in (range(layout.vpp) if virtual else [None])]
    if load is not None:
        load(chunks)
    ddp = data_parallel(layout, cfg, chunks)
    gather = ddp[0].ddp_config.overlap_param_gather
    optimizer = get_megatron_optimizer(OptimizerConfig(
        optimizer="adam", lr=LR, weight_decay=DECAY, clip_grad=CLIP, use_distributed_optimizer=layout.distributed_optimizer, overlap_param_gather=gather), ddp)
    full = data or batch(length)
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = {k: v.chunk(ranks)[rank] for k, v in full.items()}
    return tv.Training(chunks, step_of(ddp, optimizer, mine), batch=full, save=lambda folder: dist_checkpointing.save(sharded(chunks), folder),
                       finish=(lambda: [chunk.disable_forward_pre_hook() for chunk in ddp]) if gather else None)


def sharded(chunks):
    """What dist_checkpointing stores of this rank's chunks."""
    return {f"chunk{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}


def checkpoint(folder):
    """A function that loads this rank's chunks from what dist_checkpointing saved."""
    def load(chunks):
        for chunk, state in zip(chunks, dist_checkpointing.load(sharded(chunks), folder).values()):
            chunk.load_state_dict(state)
    return load


def forward_step(iterator, model):
    tokens, labels = next(iterator)
    length = tokens.shape[-1]
    full = {"tokens": tokens, "labels": labels, "positions": torch.arange(length).expand(ROWS, -1)}
    tokens, labels, positions = get_batch_on_this_cp_rank(full).values()
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril().logical_not()
    losses = model(tokens, positions, mask, labels=labels.clamp(min=0))
    counted = (labels != IGNORE).float()

    def loss_of(losses):
        total = (losses.float() * counted).sum()
        return total, counted.sum().int(), {"loss": total.detach().clone()}
    return losses, loss_of


def step_of(ddp, optimizer, data):
    forward_backward = get_forward_backward_func()
    count, _, length = data["tokens"].shape

    def step():
        for chunk in ddp:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        microbatches = [zip(data["tokens"], data["labels"]) for _ in ddp]
        reported = forward_backward(forward_step_func=forward_step, data_iterator=microbatches if len(ddp) > 1 else microbatches[0], model=ddp,
                                    num_microbatches=count, seq_length=length, micro_batch_size=ROWS, forward_only=False)
        _, norm, _ = optimizer.step()
        values = {"grad_norm": norm}
        if reported:                           # the last stage of the pipeline
            values["loss"] = tv.local(sum(r["loss"] for r in reported), reduce="sum", group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return values
    return step
