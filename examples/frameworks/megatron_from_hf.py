"""megatron-core against Hugging Face's Llama, whose weights are converted to Megatron's: fused qkv per group of heads, fused gate and up.

Megatron's own attention masks with -10000. Over the real numbers exp(-10000) is not 0, so the Llama is given an attention function that does so too.
"""
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

import trainverify as tv
from common.mcore import CLIP, DECAY, FFN, GROUPS, HEAD, HEADS, HIDDEN, IGNORE, LAYERS, LR, VOCAB, Layout, batch, training

CASES = [{"tp": 2, "sp": True}, {"pp": 2}, {}]


def RANKS(tp=1, pp=1, sp=False):
    return tp * pp


def attention(module, query, key, value, attention_mask, scaling, **unused):
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -10000.0).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def reference():
    torch.manual_seed(0)
    AttentionInterface.register("masked_with_-10000", attention)
    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=GROUPS, head_dim=HEAD,
        vocab_size=VOCAB, rms_norm_eps=1e-5, tie_word_embeddings=False, attn_implementation="masked_with_-10000"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    data = batch()

    def step():
        total = 0.0
        for tokens, labels in zip(data["tokens"], data["labels"]):
            logits = model(input_ids=tokens, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
            total += loss.detach()
            (loss / (labels != IGNORE).sum() / len(data["tokens"])).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
        if CLIP / (norm + 1e-6) < 1.0:
            for p in model.parameters():
                p.grad.mul_(CLIP / (norm + 1e-6))
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": total, "grad_norm": norm}
    return tv.Training(model, step, batch=data)


def parallel(ref, tp=1, pp=1, sp=False):
    return training(Layout(tp, pp, sp=sp), load=lambda chunks: convert(*chunks, ref.weights), data=ref.batch)


def convert(model, llama):
    """Fill this rank's part of a GPTModel from the state dict of a Llama."""
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    first = model.decoder.layers[0].layer_number - 1

    def rows(weight):
        return weight.chunk(tp, 0)[rank]

    def columns(weight):
        return weight.chunk(tp, 1)[rank]

    state = {"decoder.final_layernorm.weight": llama["model.norm.weight"], "output_layer.weight": rows(llama["lm_head.weight"]),
             "embedding.word_embeddings.weight": rows(llama["model.embed_tokens.weight"])}
    for i in range(len(model.decoder.layers)):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{first + i}."
        q, k, v = (llama[f"{theirs}self_attn.{x}_proj.weight"].unflatten(0, (GROUPS, -1)) for x in "qkv")
        gate, up = (llama[f"{theirs}mlp.{x}_proj.weight"] for x in ("gate", "up"))
        state |= {
            ours + "self_attention.linear_qkv.weight": rows(torch.cat([q, k, v], 1).flatten(0, 1)),
            ours + "self_attention.linear_proj.weight": columns(llama[theirs + "self_attn.o_proj.weight"]),
            ours + "mlp.linear_fc1.weight": torch.cat([rows(gate), rows(up)]),
            ours + "mlp.linear_fc2.weight": columns(llama[theirs + "mlp.down_proj.weight"]),
            ours + "input_layernorm.weight": llama[theirs + "input_layernorm.weight"],
            ours + "pre_mlp_layernorm.weight": llama[theirs + "post_attention_layernorm.weight"]}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
