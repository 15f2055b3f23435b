"""What torchtitan's Trainer needs where there is no network: a loader of rows at hand, no tokenizer, and the settings that all its examples share."""
import tempfile
from dataclasses import dataclass

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config import TrainingConfig
from torchtitan.config.configs import DebugConfig
from torchtitan.trainer import Trainer

VOCAB, LENGTH = 40, 8


class RowsAtHand(BaseDataLoader):
    """Each rank's rows of the steps' batches (`batches()`: tokens and labels of a step), one microbatch after another."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config, *, dp_world_size, dp_rank, local_batch_size, **unused):
        self.config, self.degree, self.rank, self.rows = config, dp_world_size, dp_rank, local_batch_size

    def batches(self):
        raise NotImplementedError

    def __iter__(self):
        for tokens, labels in self.batches():
            positions = torch.arange(tokens.shape[-1]).expand(self.rows, -1)
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


def tiny_trainer(model_spec, rows, length=LENGTH, chunks=4, global_rows=-1, **parts):
    """A Trainer.Config; `rows`: of one microbatch on one data-parallel rank, `chunks`: of the loss along the sequence."""
    config = Trainer.Config(
        model_spec=model_spec,
        loss=ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=CrossEntropyLoss.Config(global_vocab_size=VOCAB)),
        optimizer=default_adamw(lr=1e-2), lr_scheduler=LRSchedulersContainer.Config(warmup_steps=0),
        training=TrainingConfig(local_batch_size=rows, global_batch_size=global_rows, seq_len=length, steps=10, max_norm=0.5,
                                mixed_precision_param="float32", disable_cuda_graphs=True),
        tokenizer=NoTokenizer.Config(), debug=DebugConfig(seed=1, enable_structured_logging=False), dump_folder=tempfile.mkdtemp(), **parts)
    config.validator.enable = False
    return config
