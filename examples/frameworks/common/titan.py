"""What the torchtitan examples share: a tiny configuration of torchtitan's own Trainer, its data, and its step as a Training.

Everything that trains is torchtitan's: Trainer.train_step, its parallelize functions, optimizers, clipping and checkpointer. The
configuration replaces what would need a network (the data set); attention is plain causal unless it is to be torchtitan's FlexAttention.
"""
import tempfile
from dataclasses import dataclass

import torch

import trainverify as tv
from torchtitan.components.checkpointer import AsyncMode, CheckpointManager, ModelWrapper
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.config.configs import DebugConfig
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.trainer import Trainer

VOCAB = 40
LENGTH = 8


def make_batches(rows, length=LENGTH, steps=2, seed=1):
    """For each step the rows of the global batch: tokens, and labels of which some are ignored, unequally many per row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (steps, rows, length + 1), generator=generator)
    labels = tokens[:, :, 1:].clone()
    for row in range(rows):
        labels[:, row, : row % 4] = IGNORE_INDEX
    return {"tokens": tokens[:, :, :-1].contiguous(), "labels": labels}


class GivenBatches(BaseDataLoader):
    """Each rank's rows of given batches, one microbatch after another."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    batches: dict = {}

    def __init__(self, config, *, dp_world_size, dp_rank, local_batch_size, **unused):
        self.degree, self.rank, self.rows = dp_world_size, dp_rank, local_batch_size

    def __iter__(self):
        positions = torch.arange(self.batches["tokens"].shape[-1]).expand(self.rows, -1)
        for tokens, labels in zip(self.batches["tokens"], self.batches["labels"], strict=True):
            for part in range(self.rank, tokens.shape[0] // self.rows, self.degree):
                rows = slice(part * self.rows, (part + 1) * self.rows)
                yield {"input": tokens[rows], "positions": positions}, labels[rows]

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class NoTokenizer(BaseTokenizer):
    """The batches are tokens already."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config, *, tokenizer_path=None):
        super().__init__()

    def encode(self, *args, **kwargs):
        return []

    def decode(self, *args, **kwargs):
        return ""

    def get_vocab_size(self):
        return VOCAB


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
    config = Trainer.Config(
        model_spec=model_spec,
        loss=ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=CrossEntropyLoss.Config(global_vocab_size=VOCAB)),
        optimizer=default_adamw(lr=1e-2),
        lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0),
        training=TrainingConfig(local_batch_size=rows, global_batch_size=global_rows, seq_len=length, steps=10, max_norm=0.5,
                                mixed_precision_param="float32", disable_cuda_graphs=True),
        dataloader=GivenBatches.Config(), tokenizer=NoTokenizer.Config(), metrics=KeptMetrics.Config(),
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor", **parallelism),
        checkpoint=CheckpointManager.Config(enable=True, initial_load_path=checkpoint, keep_latest_k=0),
        activation_checkpoint=recompute, debug=DebugConfig(seed=1, enable_structured_logging=False), dump_folder=tempfile.mkdtemp())
    config.validator.enable = False
    return config.build()


def training(trainer, batches, reference=True):
    """The trainer's own step, after its own loading of the checkpoint."""
    trainer.dataloader.batches = batches
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
