"""Layer-wise optimisation in other people's loops. Nothing here is imported by the plugin itself.

accelerate     Hugging Face's accelerate: `prepare(accelerator, model, config, ...)`
transformers   `use_lwo(trainer, config)` for transformers' Trainer and its subclasses
optimizer      what both loops see as the optimizer, and what it saves
settings       what the host and the hook must agree on, and what is refused
"""
