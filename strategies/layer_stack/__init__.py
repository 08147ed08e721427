"""Transformer blocks: FSDP prefetch and rematerialisation."""
