"""FSDP2: `builder` shards our models, `strategy` trains sharded models, `shards` splits tensors."""
