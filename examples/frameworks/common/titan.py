"""What the torchtitan examples share: a tiny configuration of torchtitan's own Trainer, its data, and its step as a Training.

Everything that trains is torchtitan's: Trainer.train_step, its parallelize functions, optimizers, clipping and checkpointer. The
configuration replaces what would need a network (the data set); attention is plain causal unless it is to be torchtitan's FlexAttention.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import trainverify as tv  # noqa: E402
from models.titan_parts import LENGTH, VOCAB, RowsAtHand, tiny_trainer  # noqa: E402
from torchtitan.components.checkpointer import AsyncMode, CheckpointManager, ModelWrapper  # noqa: E402
from torchtitan.components.loss import IGNORE_INDEX  # noqa: E402
from torchtitan.components.metrics import MetricsProcessor  # noqa: E402
from torchtitan.config import ParallelismConfig  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402


def make_batches(rows, length=LENGTH, steps=2, seed=1):
    """For each step the rows of the global batch: tokens, and labels of which some are ignored, unequally many per row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (steps, rows, length + 1), generator=generator)
    labels = tokens[:, :, 1:].clone()
    for row in range(rows):
        labels[:, row, : row % 4] = IGNORE_INDEX
    return {"tokens": tokens[:, :, :-1].contiguous(), "labels": labels}


class GivenBatches(RowsAtHand):
    """Rows of given batches."""

    @dataclass(kw_only=True, slots=True)
    class Config(RowsAtHand.Config):
        pass

    given: dict = {}

    def batches(self):
        return zip(self.given["tokens"], self.given["labels"], strict=True)


class KeptMetrics(MetricsProcessor):
    """Keeps what the trainer would log."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        log_freq: int = 1

    def log(self, step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=None):
        self.kept = {"loss": global_avg_loss, "grad_norm": grad_norm}


def build(model_spec, rows, length=LENGTH, chunks=4, global_rows=-1, checkpoint=None, attention=ScaledDotProductAttention,
          recompute=None, **parallelism):
    """torchtitan's Trainer for this model; `rows`: of one microbatch on one data-parallel rank, `chunks`: of the loss along the sequence."""
    for layer in model_spec.model.layers:
        layer.attention.inner_attention = attention.Config()
    config = tiny_trainer(
        model_spec, rows, length, chunks, global_rows, dataloader=GivenBatches.Config(), metrics=KeptMetrics.Config(),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor", **parallelism),
        checkpoint=CheckpointManager.Config(enable=True, initial_load_path=checkpoint, keep_latest_k=0), activation_checkpoint=recompute)
    return config.build()


def training(trainer, batches, reference=True):
    """The trainer's own step, after its own loading of the checkpoint."""
    trainer.dataloader.given = batches
    trainer.checkpointer.load()
    data = trainer.batch_generator(trainer.dataloader)

    def step():
        trainer.step += 1
        trainer.train_step(data)
        kept = dict(trainer.metrics_processor.kept)
        if trainer.parallel_dims.pp_enabled and not trainer.pp_has_last_stage:
            del kept["loss"]                   # torchtitan logs -1 there
        return kept

    def save(folder):
        trainer.checkpointer.dcp_save(ModelWrapper(trainer.model_parts).state_dict(), folder, async_mode=AsyncMode.DISABLED)

    return tv.Training(trainer.model_parts, step, batch=batches if reference else None, save=save if reference else None)
