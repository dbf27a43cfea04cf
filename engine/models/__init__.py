"""A model config becomes a transformers module."""
