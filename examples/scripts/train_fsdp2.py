"""Trains a small GPT with FSDP2, as tutorials do:

    torchrun --nproc-per-node 3 train_fsdp2.py --batch-size 2 --load weights

One process runs the same script unsharded. --loss local is a bug that is often made: every rank divides by the tokens
of its own batch, and FSDP averages over ranks that have different numbers of them.
"""
import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

IGNORE = -100
VOCAB, LENGTH, WIDTH, HEADS, LAYERS = 29, 7, 20, 4, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH))

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Texts(Dataset):
    """Sequences of random tokens, of different lengths."""

    def __init__(self, size, seed):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(VOCAB, (size, LENGTH + 1), generator=generator)
        self.lengths = torch.randint(3, LENGTH + 1, (size,), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        labels = self.tokens[i, 1:].clone()
        labels[self.lengths[i]:] = IGNORE
        return self.tokens[i, :-1], labels


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=6, help="of each rank")
    parser.add_argument("--load", help="folder with model.safetensors")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--loss", choices=("global", "local"), default="global", help="over which batch tokens are counted")
    args = parser.parse_args()

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    torch.manual_seed(0)

    model = GPT().to(device)
    if world > 1:
        mesh = init_device_mesh("cuda", (world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if args.load:
        weights = load_file(os.path.join(args.load, "model.safetensors"))
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)

    dataset = Texts(size=24, seed=1)
    sampler = DistributedSampler(dataset, num_replicas=world, rank=rank, shuffle=True)
    loader = DataLoader(dataset, batch_size=args.batch_size, sampler=sampler)
    step = 0
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for tokens, labels in loader:
            tokens, labels = tokens.to(device), labels.to(device)
            loss_sum = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
            count = (labels != IGNORE).sum()
            if args.loss == "global":
                dist.all_reduce(count)
            else:
                count = count * world
            # FSDP averages gradients over ranks.
            (loss_sum / count * world).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()

            loss = loss_sum.detach() / count
            dist.all_reduce(loss)
            norm = norm.full_tensor() if world > 1 else norm
            if rank == 0:
                print(f"step {step} loss {loss.item():.4f} norm {norm.item():.4f}")
            step += 1
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
