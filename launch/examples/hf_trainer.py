"""Layer-wise optimisation in transformers' Trainer: the usual script, and `use_lwo`.

    torchrun --master-port 29500 --nproc-per-node 2 launch/examples/hf_trainer.py

The same command with more --steps goes on from the last checkpoint in --output.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import LENGTH, SEQUENCES, load
from transformers import Trainer, TrainingArguments

from lwo_dist import LWOConfig
from lwo_dist.integrations.transformers import use_lwo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="id or folder of a decoder; default: a tiny random one")
    parser.add_argument("--steps", type=int, default=40, help="where to stop")
    parser.add_argument("--output", type=Path, default=Path("lwo_trainer"))
    options = parser.parse_args()
    model, tokens = load(options.model)
    blocks = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=SEQUENCES,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            save_steps=20,
            logging_steps=1,
            report_to=[],
        ),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
    )
    use_lwo(trainer, LWOConfig(steps_per_layer=2, state="keep"))
    trainer.train(resume_from_checkpoint=any(options.output.glob("checkpoint-*")))
    trainer.save_model()  # for from_pretrained


if __name__ == "__main__":
    main()
