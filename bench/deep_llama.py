"""A deep Llama at TP2 with sequence parallelism and loss parallelism: cost per layer, without data parallelism on top. Uses the plans of examples/fsdp2_tp.py."""
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import trainverify as tv  # noqa: E402
from fsdp2_tp import LAYER_PLAN, MODEL_PLAN  # noqa: E402
from models.llama import Config, Llama, random_batch, token_loss  # noqa: E402

RANKS = 2
ROWS, LENGTH, LAYERS = 2, 32, 32


def config(layers):
    return Config(vocab=64, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, layers=layers)


def training(model, batch):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    def step():
        loss = token_loss(model(batch["tokens"]), batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}

    return step


def reference():
    torch.manual_seed(0)
    model, batch = Llama(config(LAYERS)), random_batch(ROWS, LENGTH, 64)
    return tv.Training(model, training(model, batch), batch=batch)


def parallel(ref):
    dist.init_process_group("nccl")
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    model = Llama(config(LAYERS))
    model.load_state_dict(ref.weights)
    parallelize_module(model, mesh, MODEL_PLAN)
    for layer in model.layers:
        parallelize_module(layer, mesh, LAYER_PLAN)
    plain = training(model, ref.batch)

    def step():
        with loss_parallel():
            return {"loss": plain()["loss"].full_tensor()}

    return tv.Training(model, step)
