"""FSDP2: `builder` shards a model of ours, `strategy` trains any sharded one, `shards` cuts."""
