"""A small language model under Hugging Face's Trainer; hf_trainer.py differs by what ftkit asks for."""

import torch
from ftkit.integrations.huggingface import Trainer, TrainingArguments
from torch.utils import data
from transformers import LlamaConfig, LlamaForCausalLM


class Counting(data.Dataset):
    """Rows of tokens that count up from somewhere, in steps of one, two or three."""

    def __len__(self):
        return 512

    def __getitem__(self, index):
        tokens = (index * 7 + torch.arange(16) * (1 + index % 3)) % 64
        return {"input_ids": tokens, "labels": tokens}


def main():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    arguments = TrainingArguments(
        output_dir="runs/hf",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=60,
        learning_rate=1e-2,
        warmup_steps=5,
        logging_steps=10,
        save_steps=30,
        eval_strategy="steps",
        eval_steps=30,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=Counting(),
        eval_dataset=Counting(),
    )
    trainer.train()


if __name__ == "__main__":
    main()
