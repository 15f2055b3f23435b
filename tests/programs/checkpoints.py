"""Ways by which weights reach the parallel program: files of several kinds, numpy, bfloat16; the model is replicated, or sharded while it loads."""
import json

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from smallgpt import IGNORE, Gpt, clip, loss_of, make_batch, share, training
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import trainverify as tv

RANKS = 2


def reference():
    torch.manual_seed(0)
    model, batch = Gpt(tied=True), make_batch()

    def backward():
        loss = loss_of(model(batch["tokens"]), batch["labels"])
        loss.backward()
        return loss

    made = training(model, backward, batch=batch)

    def save(folder):
        state = model.state_dict()
        torch.save(state, f"{folder}/state.pt")
        torch.save({"model": {k: v.to(torch.float64) for k, v in state.items()}}, f"{folder}/double.pt", _use_new_zipfile_serialization=False)
        np.savez(f"{folder}/state.npz", **{k: v.numpy() for k, v in state.items()})
        dcp.save({"model": state}, checkpoint_id=f"{folder}/dcp")
        from safetensors.torch import save_model
        save_model(model, f"{folder}/model.safetensors")
        transposed = {k: v.t().contiguous().numpy().tolist() for k, v in state.items() if v.dim() == 2}
        (open(f"{folder}/matrices.json", "w")).write(json.dumps(transposed))

    return tv.Training(model, made.step, batch=batch, save=save)


def run(ref, model, finish=lambda norm: norm):
    world = dist.get_world_size()
    data = share(ref.batch, world, dist.get_rank())

    def backward():
        total = (data["labels"] != IGNORE).sum()
        dist.all_reduce(total)
        loss = loss_of(model(data["tokens"]), data["labels"], reduction="sum") / total
        (loss * world).backward()
        return tv.local(loss, reduce="sum")

    return training(model, backward, clip=lambda parameters: finish(clip(parameters)))


def replicated(ref, state, wrong):
    model = Gpt(tied=True)
    state = {k: v.roll(1, 0) if wrong and k == "layers.1.norm2.weight" else v for k, v in state.items()}
    model.load_state_dict(state)
    return run(ref, DistributedDataParallel(model))


def pickled(ref, wrong):
    return replicated(ref, torch.load(f"{ref.checkpoint()}/state.pt", map_location="cpu", weights_only=True), wrong)


def double(ref, wrong):
    """float64 in the old file format, read with mmap off."""
    return replicated(ref, torch.load(f"{ref.checkpoint()}/double.pt", weights_only=False)["model"], wrong)


def numpy(ref, wrong):
    with np.load(f"{ref.checkpoint()}/state.npz") as arrays:
        halves = {k: (arrays[k][: len(arrays[k]) // 2], arrays[k][len(arrays[k]) // 2:]) for k in arrays.files}
    return replicated(ref, {k: torch.from_numpy(np.concatenate(v)) for k, v in halves.items()}, wrong)


def round_trip(ref, wrong):
    """Tensors that leave for numpy and Python lists at load, and come back."""
    return replicated(ref, {k: torch.tensor(v.numpy().astype(np.float64).tolist(), dtype=torch.float32) for k, v in ref.weights.items()}, wrong)


def text(ref, wrong):
    """Matrices written as text, transposed."""
    with open(f"{ref.checkpoint()}/matrices.json") as file:
        matrices = {k: torch.tensor(v).t() for k, v in json.load(file).items()}
    return replicated(ref, {**ref.weights, **matrices}, wrong)


def safetensors(ref, wrong):
    from safetensors.torch import load_model
    model = Gpt(tied=True)
    load_model(model, f"{ref.checkpoint()}/model.safetensors")
    return replicated(ref, model.state_dict(), wrong)


def sharded(ref, wrong, load):
    with torch.device("meta"):
        model = Gpt(tied=True)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    model.head.weight = model.embed.weight
    load(model)
    if wrong:
        with torch.no_grad():
            model.layers[0].norm1.bias.mul_(2)
    return run(ref, model, lambda norm: norm.full_tensor())


def broadcast(ref, wrong):
    """Rank 0 has the full state dict and gives it to the others."""
    def load(model):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, dict(ref.weights) if dist.get_rank() == 0 else {}, options=options)
    return sharded(ref, wrong, load)


def distributed(ref, wrong):
    """torch.distributed.checkpoint: every rank reads its shards."""
    def load(model):
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=f"{ref.checkpoint()}/dcp")
        set_model_state_dict(model, state["model"])
    return sharded(ref, wrong, load)


def half(ref, wrong):
    """A float32 master copy that was filled from bfloat16 pieces: high and low halves of the weights."""
    high = {k: v.to(torch.bfloat16) for k, v in ref.weights.items()}
    low = {k: v - high[k].float() for k, v in ref.weights.items()}
    return replicated(ref, {k: high[k].float() + low[k] for k in high}, wrong)


def parallel(ref, how, wrong=False):
    dist.init_process_group("nccl")
    return globals()[how](ref, wrong)
