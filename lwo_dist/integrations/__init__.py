"""Layer-wise optimisation in other people's loops. Nothing here is imported by the plugin itself.

accelerate     Hugging Face's accelerate: `prepare(accelerator, model, config, ...)`
transformers   `use_lwo(trainer, config)` for transformers' Trainer and its subclasses
"""
