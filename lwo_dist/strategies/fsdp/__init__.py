"""FSDP2: `builder` shards our models, `strategy` trains sharded models, `checks` refuses others."""
