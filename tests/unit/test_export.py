"""What an export writes besides weights that are published as they were trained."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, MixtralConfig, MixtralForCausalLM

from lwo_dist.checkpoint.export import export_model
from lwo_dist.checkpoint.format import newest_checkpoint
from lwo_dist.checkpoint.store import LayerStore
from lwo_dist.config import LWOConfig
from lwo_dist.hook import attach
from tests import stores


def test_fused_experts_get_their_names_and_the_generation_settings_stay(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=31, **sizes, **heads))
    settings = GenerationConfig(eos_token_id=[3, 5], pad_token_id=7)

    def model_files(folder: Path) -> None:
        model.config.save_pretrained(folder)
        settings.save_pretrained(folder)

    lwo = attach(model, LWOConfig())
    store = LayerStore(stores.run_folder(tmp_path), model_files)
    store.save(lwo, {})
    store.wait()
    checkpoint = newest_checkpoint(stores.run_folder(tmp_path))
    assert checkpoint is not None
    target = export_model(checkpoint, tmp_path / "model")
    names = load_file(target / "model.safetensors")
    assert any("experts.1." in name for name in names)  # apart, as they are published
    exported = GenerationConfig.from_pretrained(target)
    assert (exported.eos_token_id, exported.pad_token_id) == ([3, 5], 7)
    loaded = AutoModelForCausalLM.from_pretrained(target).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)
