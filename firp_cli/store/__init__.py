"""Hidden-state store: sharded safetensors files with a manifest."""
