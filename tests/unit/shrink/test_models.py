"""Reduced traces of transformers' models compute what the same models compute when they are built at the reduced sizes, forward and backward: their counts
(of a mean, of the scale of attention) are then the only thing to be told, since a reduction keeps them."""
import pytest
import torch
import torch.nn.functional as F

import trainverify as tv
from shrink.kit import captured
from shrink.test_llama import batch_of, kept_positions, tensor
from trainverify.ops.standard import standard_table
from trainverify.shrink.check import execute
from trainverify.shrink.reduce import reduce_programs

ROWS, LENGTH, VOCABULARY = 9, 14, 90
LLAMA = dict(hidden_size=60, intermediate_size=56, num_hidden_layers=2, num_attention_heads=24, num_key_value_heads=12, head_dim=20, vocab_size=VOCABULARY,
             max_position_embeddings=32, tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa")
DEEPSEEK = dict(hidden_size=44, intermediate_size=56, num_hidden_layers=2, first_k_dense_replace=2, num_attention_heads=12, num_key_value_heads=12, q_lora_rank=26,
                kv_lora_rank=22, qk_nope_head_dim=15, qk_rope_head_dim=20, v_head_dim=27, vocab_size=VOCABULARY, max_position_embeddings=32,
                tie_word_embeddings=False, use_cache=False, attn_implementation="eager")


def model_of(name: str, **sizes):
    import transformers

    config = getattr(transformers, f"{name}Config")(**{**sizes, "hidden_size": 2 * sizes["num_attention_heads"]})      # its own check: a multiple
    config.hidden_size, config._attn_implementation = sizes["hidden_size"], sizes["attn_implementation"]
    return getattr(transformers, f"{name}ForCausalLM")(config)


def programs(name: str, sizes: dict):
    def training(model, batch):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step():
            optimizer.zero_grad()
            logits = model(input_ids=batch["tokens"]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
            loss.backward()
            optimizer.step()
            return {"loss": loss}
        return tv.Training(model, step, batch)

    def reference():
        torch.manual_seed(0)
        drawn = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1))
        labels = drawn[:, 1:].clone()
        labels[:, -1] = -100
        return training(model_of(name, **sizes), {"tokens": drawn[:, :-1].contiguous(), "labels": labels})

    def parallel(ref):
        model = model_of(name, **sizes)
        model.load_state_dict(ref.weights, strict=False)
        return training(model, ref.batch)

    return captured(reference, parallel, 1)


def llama_sizes(symbols: dict, ops) -> dict:
    q = next(c.args[0] for c in ops if c.name.startswith("aten._scaled_dot_product"))
    first = "model.layers.0."
    return dict(hidden_size=symbols["model.norm.weight"].shape[0], intermediate_size=symbols[first + "mlp.gate_proj.weight"].shape[0], num_attention_heads=q.size[1],
                head_dim=q.size[3], num_key_value_heads=symbols[first + "self_attn.k_proj.weight"].shape[0] // q.size[3])


def deepseek_sizes(symbols: dict, ops) -> dict:
    def rows(name: str) -> int:
        return symbols[f"model.layers.0.{name}.weight"].shape[0]

    queries, out, keys = rows("self_attn.q_b_proj"), symbols["model.layers.0.self_attn.o_proj.weight"].shape[1], rows("self_attn.kv_b_proj")
    latent = rows("self_attn.kv_a_layernorm")
    rope = rows("self_attn.kv_a_proj_with_mqa") - latent
    heads = (queries + out - keys) // rope
    return dict(hidden_size=rows("input_layernorm"), intermediate_size=rows("mlp.gate_proj"), num_attention_heads=heads, num_key_value_heads=heads,
                q_lora_rank=rows("self_attn.q_a_proj"), kv_lora_rank=latent, qk_rope_head_dim=rope, qk_nope_head_dim=queries // heads - rope, v_head_dim=out // heads)


def counting(small, full, positions) -> None:
    """The small model, with the counts of the full one and these positions."""
    norms = {name: m.weight.numel() for name, m in full.named_modules() if type(m).__name__.endswith("RMSNorm")}

    def normed(self, x, n):
        return self.weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / n + self.variance_epsilon))

    for name, m in small.named_modules():
        if name in norms:
            m.forward = lambda x, m=m, n=norms[name]: normed(m, x, n)
        if hasattr(m, "scaling"):
            m.scaling = full.get_submodule(name).scaling
        if hasattr(m, "inv_freq"):
            m.forward = lambda x, position_ids, rotary=m.forward: rotary(x, positions[None])
            m.inv_freq = full.get_submodule(name).inv_freq[:m.inv_freq.numel()].clone()


@pytest.mark.slow
@pytest.mark.parametrize("name, sizes, derived", [("Llama", LLAMA, llama_sizes), ("DeepseekV3", DEEPSEEK, deepseek_sizes)])
def test_model_at_the_reduced_sizes(name, sizes, derived):
    small = reduce_programs(*programs(name, sizes), standard_table())
    ops = small.reference.traces[0].ops
    symbols = {c.args[1]: tensor(small.reference, f"symbol.{c.args[1]}", c.args[2], torch.float32) for c in ops if c.name == "tv.symbol"}
    outputs = execute(small.reference, standard_table()).machines[0].outputs
    found = {(o.kind, o.name): torch.as_tensor(o.native) for o in outputs}
    batch = batch_of(small.reference)
    changed = {**derived(symbols, ops), "vocab_size": symbols["lm_head.weight"].shape[0]}
    assert all(n < sizes[k] for k, n in changed.items()), (changed, small.classes.spaces.pins)

    model, full = model_of(name, **{**sizes, **changed}), model_of(name, **sizes)
    counting(model, full, kept_positions(small))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for key, value in symbols.items():
            state[key].copy_(value)
    length = batch["tokens"].shape[1]
    assert batch["tokens"].shape[0] < ROWS and length < LENGTH
    logits = model(input_ids=batch["tokens"]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum") / (ROWS * (LENGTH - 1))
    loss.backward()
    torch.testing.assert_close(found[("scalar", "loss")].float().reshape(()), loss.detach(), rtol=1e-5, atol=1e-6)
    gradients = {n: g for (kind, n), g in found.items() if kind == "gradient"}
    assert len(gradients) == len(list(model.parameters()))
    for key, p in model.named_parameters():
        torch.testing.assert_close(gradients[key], p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
