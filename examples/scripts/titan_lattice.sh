#!/bin/bash
# torchtitan's own training script under six settings, in one run with one table (from the repository's folder, after `make frameworks`).
set -eu
titan="-m torchtitan.train --module examples.scripts.titan_config --config tiny_qwen3_moe"
load="$titan --checkpoint.initial_load_path {dcp}"
ddp="$load --training.local_batch_size 3 --parallelism.data_parallel_replicate_degree 2 --parallelism.data_parallel_shard_degree 1"
fsdp="$load --training.local_batch_size 3 --parallelism.data_parallel_shard_degree 2"
fsdp_tp="$load --training.local_batch_size 2 --parallelism.data_parallel_shard_degree 3 --parallelism.tensor_parallel_degree 2"
exec "${TRAINVERIFY:-trainverify}" verify --ranks 2 --reference "$titan" \
  --run "$ddp" --run "$fsdp" --run "ranks=6 $fsdp_tp" \
  --run "ranks=4 $fsdp --parallelism.pipeline_parallel_degree 2" \
  --run "ranks=4 $fsdp --parallelism.context_parallel_degree 2" \
  --run "$fsdp --parallelism.expert_parallel_degree 2" "$@"
