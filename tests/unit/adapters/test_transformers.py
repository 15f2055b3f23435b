"""Llama with flash_attention_2, by the stand-in for flash_attn, against the same model with torch's attention."""
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
import trainverify as tv
from trainverify.verify import verify

SIZES = dict(vocab_size=20, hidden_size=12, num_attention_heads=3, num_key_value_heads=1, head_dim=4, intermediate_size=10, num_hidden_layers=1)


def training(attention, ref=None):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation=attention)
    if ref is not None:
        model.load_state_dict(ref.weights)
    ids = torch.randint(0, 20, (2, 5)) if ref is None else ref.batch["ids"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return {"loss": loss}
    return tv.Training(model, step, batch={"ids": ids})


def reference():
    return training("sdpa")


def parallel(ref):
    return training("flash_attention_2", ref)


def judged():
    return verify(reference, parallel, ranks=1, steps=1, stand_ins=["flash_attn"])


def test_flash_attention_without_a_gpu():
    """In a process of its own: what replaces parts of transformers does so while it is imported, and other tests may have imported it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        report = fresh.submit(judged).result()
    assert report.verdict == "PROVED", ([(o.kind, o.name, o.reason) for o in report.outputs if o.verdict != "PROVED"], report.diagnostics)
    assumed = {a.text.split(" computes")[0]: a.places for a in report.assumptions}
    assert "modeling_flash_attention_utils.py" in assumed["stand-in: flash_attn.flash_attn_func"][0]
    assert any(a.text.startswith("transformers: asks for a GPU") for a in report.assumptions)
