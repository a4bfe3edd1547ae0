"""Data: rows read strictly, tokenizers, ragged batches, and a report before training."""
