"""Trains a Hugging Face Llama in a plain loop, under DDP or (--tp) under the tensor parallelism of transformers:

    torchrun --nproc-per-node 2 train_llama_hf.py --rows 2
    torchrun --nproc-per-node 2 train_llama_hf.py --model folder --tp

--count microbatch is a bug that transformers itself had: every microbatch divides by its own number of tokens.
"""
import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import DistributedConfig, LlamaConfig, LlamaForCausalLM

IGNORE = -100
CONFIG = LlamaConfig(vocab_size=36, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=6,
                     num_key_value_heads=2, head_dim=4, max_position_embeddings=16, use_cache=False)


def batches(rows, accumulate, steps, seed=0):
    """Per step, the microbatches of all ranks: tokens, and the labels that count, of which rows have different numbers."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(CONFIG.vocab_size, (accumulate, rows, 8), generator=generator)
        lengths = torch.randint(3, 9, (accumulate, rows, 1), generator=generator)
        yield list(zip(tokens, tokens.where(torch.arange(8) < lengths, IGNORE)))


def clip(parameters, most):
    """Tensor parallelism leaves the norm weights plain tensors: a norm for each kind, then both together."""
    kinds = {}
    for p in parameters:
        kinds.setdefault(isinstance(p, DTensor), []).append(p)
    norms = [get_total_norm([p.grad for p in held]) for held in kinds.values()]
    norms = [n.full_tensor() if isinstance(n, DTensor) else n for n in norms]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for held in kinds.values():
        clip_grads_with_norm_(held, most, norm)
    return norm


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="folder of a pretrained model")
    parser.add_argument("--tp", action="store_true", help="tensor parallelism over all ranks in place of DDP")
    parser.add_argument("--rows", type=int, default=4, help="of a microbatch of each data-parallel rank")
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--count", choices=("step", "microbatch"), default="step", help="the tokens that a loss is divided by")
    args = parser.parse_args()

    dist.init_process_group("nccl")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.manual_seed(0)
    config = {"distributed_config": DistributedConfig(tp_plan="auto")} if args.tp else {}
    model = LlamaForCausalLM.from_pretrained(args.model, **config) if args.model else LlamaForCausalLM(CONFIG)
    model = model.cuda().train()
    dp, dp_rank = (1, 0) if args.tp else (world, rank)
    wrapped = DistributedDataParallel(model) if dp > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** step)

    for step, microbatches in enumerate(batches(args.rows * dp, args.accumulate, args.steps)):
        counts = [(labels[:, 1:] != IGNORE).sum() for _, labels in microbatches]
        total = 0.0
        for (tokens, labels), count in zip(microbatches, counts):
            mine = slice(dp_rank * args.rows, (dp_rank + 1) * args.rows)
            items = sum(counts) if args.count == "step" else count * args.accumulate
            loss = wrapped(input_ids=tokens[mine].cuda(), labels=labels[mine].cuda(), num_items_in_batch=items).loss
            (loss * dp).backward()             # DDP averages gradients
            total += loss.detach()
        norm = clip(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if dp > 1:
            dist.all_reduce(total)
        if rank == 0:
            print({"step": step, "loss": total.item(), "norm": norm.item(), "lr": scheduler.get_last_lr()[0]})


if __name__ == "__main__":
    main()
