"""The default checkpoint: safetensors, read back in two ways."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from loading import RANKS, build, load_file, safe_open, torch, training  # noqa: E402, F401


def reference():
    return training(*build())


def parallel(ref, opened=False):
    model, optimizer = build()
    file = f"{ref.checkpoint()}/model.safetensors"
    if opened:
        with safe_open(file, framework="pt") as f, torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(f.get_slice(name)[:])
    else:
        model.load_state_dict(load_file(file))
    return training(model, optimizer)
