"""The framework examples, each under its cases, with the verdict that is expected (`make bench-frameworks` runs all, `make test-frameworks` the quick ones).

A wrong twin names the line at which it must be caught: the end of the file's name, and what stands in the line.
"""
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "frameworks"


@dataclass(frozen=True)
class Case:
    """file: relative to examples/frameworks; ranks: what the spec's RANKS says for the case; why: for what is not PROVED; place: (file, text);
    stand_in: as --stand-in."""

    file: str
    case: dict = field(default_factory=dict)
    ranks: int = 2
    expected: str = "PROVED"
    quick: bool = False
    why: str = ""
    place: tuple[str, str] | None = None
    stand_in: str = ""

    @property
    def name(self) -> str:
        return self.file.removesuffix(".py") + (f"[{self.arguments}]" if self.case else "")

    @property
    def arguments(self) -> str:
        return ",".join(f"{k}={v}" for k, v in self.case.items())

    @property
    def command(self) -> list[str]:
        """Of `trainverify verify`."""
        return [str(FOLDER / self.file), *(["--case", self.arguments] if self.case else []), *(["--stand-in", self.stand_in] if self.stand_in else [])]


MEGATRON = [
    Case("megatron_cp_mean_loss.py", expected="REFUTED", why=(
        "a finding: the loss is a mean of the context-parallel ranks' means. Not refuted are two outputs. The loss that is reported in step 1 is a sum over tokens, "
        "and right; its verdict is withheld, as all are, because the norm by which clipping decides is not the reference's (REL008). The last norm's weight after "
        "step 1: Adam's first step is nearly the gradient's sign, so that these gradients, which differ by a factor near 1, move it by the same to within rounding"),
         place=("megatron/core/pipeline_parallel/schedules.py", "output_tensor /= torch.clamp(num_tokens, min=1)")),
    Case("megatron_from_hf.py", {"pp": 2}),
    Case("megatron_from_hf.py", {"tp": 2, "sp": True}, quick=True),
    Case("megatron_gpt.py", {"dp": 2, "distributed_optimizer": True}),
    Case("megatron_gpt.py", {"pp": 2}),
    Case("megatron_gpt.py", {"tp": 2}),
    Case("megatron_gpt.py", {"tp": 2, "pp": 2}, ranks=4),
    Case("megatron_gpt.py", {"tp": 2, "sp": True}),
    Case("megatron_grouped_experts.py", {"dp": 2, "ep": 2}),
    Case("megatron_interleaved.py", {"pp": 2, "vpp": 2}),
    Case("megatron_interleaved.py", {"pp": 2, "vpp": 2, "dp": 2, "distributed_optimizer": True, "overlap": True}, ranks=4),
    Case("megatron_interleaved_batched.py", expected="REFUTED",
         why=(
             "a finding: two ranks that are each other's previous and next one pair their messages in order, activations with gradients. Not refuted are the step "
             "counts of Adam, one for each parameter: they are right, and withheld, as all verdicts are, because the norm by which clipping decides is not the "
             "reference's (REL008)")),
    Case("megatron_moe.py", {"dp": 2, "ep": 2}, quick=True),
    Case("megatron_moe.py", {"dp": 2, "pp": 2, "ep": 2}, ranks=4),
    Case("megatron_moe.py", {"dp": 2, "tp": 2, "sp": True, "ep": 2, "distributed_optimizer": True}, ranks=4),
    Case("megatron_moe.py", {"tp": 2, "sp": True, "pp": 2, "ep": 2, "etp": 1, "distributed_optimizer": True}, ranks=4),
    Case("megatron_overlap.py", {"dp": 2}),
    Case("megatron_overlap.py", {"dp": 2, "distributed_optimizer": True}),
    Case("megatron_per_token_loss.py", {"dp": 2}),
    Case("megatron_per_token_loss.py", {"dp": 2, "distributed_optimizer": True}),
    Case("megatron_per_token_loss.py", {"tp": 2, "sp": True}),
    Case("megatron_te.py", {"cp": 2}),
    Case("megatron_te.py", {"cp": 3, "distributed_optimizer": True}, ranks=3),
    Case("megatron_te.py", {"tp": 2, "sp": True}),
    Case("megatron_te.py", {"tp": 2, "sp": True, "cp": 2}, ranks=4),
    Case("megatron_tied_embeddings.py", {"pp": 2}),
    Case("megatron_tied_embeddings.py", {"pp": 2, "tp": 2}, ranks=4),
    Case("wrong/megatron_dgrad_not_reduced.py", expected="REFUTED", quick=True,
         place=("megatron/core/tensor_parallel/layers.py", "grad_input = grad_output.matmul(weight)")),
]

TORCHTITAN = [
    Case("torchtitan_llama3.py", {"dp": 2}),
    Case("torchtitan_llama3.py", {"tp": 2}, quick=True),
    Case("torchtitan_llama3.py", {"dp": 2, "tp": 2}, ranks=4),
    Case("torchtitan_llama3.py", {"pp": 2}),
    Case("torchtitan_llama3.py", {"pp": 2, "schedule": "Interleaved1F1B"}),
    Case("torchtitan_llama3.py", {"dp": 2, "accumulate": 3}),
    Case("torchtitan_llama3.py", {"dp": 2, "flex": True, "recompute": True}),
    Case("torchtitan_llama3.py", {"replicas": 3, "dp": 2}, ranks=6),
    Case("torchtitan_llama3.py", {"cp": 2}),
    Case("torchtitan_llama3.py", {"dp": 2, "cp": 2}, ranks=4),
    Case("torchtitan_llama3_405b.py", ranks=8),
    Case("torchtitan_deepseek_v3_671b.py", ranks=8),
    Case("torchtitan_deepseek_v3.py", {"dp": 2, "ep": 2}, quick=True),
    Case("torchtitan_deepseek_v3.py", {"dp": 4, "ep": 2}, ranks=4),
    Case("torchtitan_deepseek_v3.py", {"tp": 2, "ep": 2}),
    Case("torchtitan_moe_pipeline.py", expected="REFUTED", place=("torchtitan/components/optimizer/optimizer.py", "moe.expert_bias_E.add_(expert_bias_delta_E)"),
         why=(
             "a finding: before the first step the experts count tokens that are none, those by which a pipeline stage learns its shapes. Not refuted are 13 outputs of "
             "step 2, behind the other routing: the loss, the norm of the gradients, the last norm's gradient with its first moment, and the updated weights of the norms "
             "and of the head, of which Adam moves most by the sign alone. All differ in the field, and at the recorded inputs by less than rounding")),
    Case("wrong/torchtitan_tokens_not_summed.py", expected="REFUTED", place=("torchtitan/components/loss.py", "loss = loss / global_valid_tokens"), quick=True),
]

DEEPSPEED = [
    Case("deepspeed_llama_bf16.py", {"stage": 2}),
    Case("deepspeed_zero.py", {"stage": 1}),
    Case("deepspeed_zero.py", {"stage": 2}),
    Case("deepspeed_zero.py", {"stage": 2, "defaults": True}),
    Case("deepspeed_zero.py", {"stage": 3}, quick=True),
    Case("deepspeed_zero.py", {"stage": 3, "defaults": True}),
    Case("wrong/deepspeed_norm_of_one_rank.py", expected="REFUTED", place=("deepspeed/runtime/zero/stage_1_and_2.py", "torch.linalg.vector_norm(g.data")),
]

TRANSFORMERS = [
    Case("transformers_llama.py", {"tied": False}),
    Case("transformers_llama.py", {"tied": True}),
    Case("transformers_mixtral.py", {"ep": 1}),
    Case("transformers_mixtral.py", {"ep": 2}, quick=True),
    Case("transformers_qwen3.py"),
    Case("wrong/transformers_norm_grads_not_reduced.py", expected="REFUTED", quick=True,
         place=("transformers/models/qwen3/modeling_qwen3.py", "return self.weight * hidden_states.to(input_dtype)")),
]

TORCH = [
    Case("torch_compiled.py"),
    Case("torch_context_parallel.py", {"rotate": "allgather"}, ranks=3),
    Case("torch_context_parallel.py", {"rotate": "alltoall"}, ranks=3),
    *(Case("torch_data_parallel.py", {"how": how}) for how in (
        "bucket_view", "checkpointed", "checkpointed_reentrant", "zero", "fsdp1_original", "fsdp1_flat", "fsdp1_accumulate", "fsdp1_mixed",
        "fsdp2_keep", "fsdp2_mixed", "fsdp2_accumulate")),
    Case("torch_data_parallel.py", {"how": "hsdp"}, ranks=4),
    *(Case("torch_optimizers.py", {"how": how}) for how in ("foreach", "fused", "sharded")),
    *(Case("torch_pipelining.py", {"schedule": name}) for name in (
        "gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "zero_bubble", "zbv", "dual_pipe_v")),
    *(Case("torch_tensor_parallel.py", {"how": how}) for how in ("by_dtensor", "no_sequence", "parallel_loss")),
    Case("wrong/torch_shares_not_averaged.py", expected="REFUTED", place=("tests/programs/smallgpt.py", "x = layer(x)")),      # torch's own lines are not named
]

CASES = [*DEEPSPEED, *MEGATRON, *TORCH, *TORCHTITAN, *TRANSFORMERS]
