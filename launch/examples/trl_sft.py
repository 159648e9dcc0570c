"""Layer-wise optimisation in TRL's SFTTrainer, on a few chats, packed.

python launch/examples/trl_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from lwo_dist import LWOConfig
from lwo_dist.integrations.transformers import use_lwo

FUNCTIONS = {"square": "x * x", "double": "x + x", "negate": "-x", "is_even": "x % 2 == 0"}


def chats() -> Dataset:
    rows = [
        [
            {"role": "user", "content": f"Write a Python function {name}."},
            {"role": "assistant", "content": f"def {name}(x):\n    return {body}\n"},
        ]
        for name, body in FUNCTIONS.items()
    ]
    return Dataset.from_dict({"messages": rows * 16})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="id or folder of a model with a chat format")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="lwo_sft")
    options = parser.parse_args()
    trainer = SFTTrainer(
        model=options.model,
        args=SFTConfig(
            output_dir=options.output,
            # The weights are fp32; the model computes in bf16.
            model_init_kwargs={"dtype": "float32"},
            bf16=torch.cuda.is_available(),
            max_steps=options.steps,
            max_length=128,
            packing=True,
            packing_strategy="wrapped",
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=chats(),
    )
    use_lwo(trainer, LWOConfig(steps_per_layer=2))
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
