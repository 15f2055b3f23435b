"""Trains a small Llama with the Trainer of transformers, all of whose arguments it takes:

    torchrun --nproc-per-node 2 train_hf_trainer.py --per_device_train_batch_size 2 --max_steps 3

--average_tokens_across_devices False is a bug: each rank then divides by the number of its own tokens, which differ.
"""
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

IGNORE = -100
CONFIG = LlamaConfig(vocab_size=36, hidden_size=24, intermediate_size=28, num_hidden_layers=1, num_attention_heads=6,
                     num_key_value_heads=2, head_dim=4, max_position_embeddings=16, use_cache=False)


class Texts(Dataset):
    """Sequences of random tokens, of which different numbers count."""

    def __init__(self, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(CONFIG.vocab_size, (size, 8), generator=generator)
        self.lengths = torch.randint(3, 9, (size,), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        counts = torch.arange(8) < self.lengths[i]
        return {"input_ids": self.tokens[i], "labels": self.tokens[i].where(counts, IGNORE)}


def main():
    defaults = {"output_dir": tempfile.mkdtemp(), "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5,
                "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(**defaults)
    arguments, = parser.parse_args_into_dataclasses()
    torch.manual_seed(0)
    Trainer(LlamaForCausalLM(CONFIG), arguments, train_dataset=Texts(24)).train()


if __name__ == "__main__":
    main()
