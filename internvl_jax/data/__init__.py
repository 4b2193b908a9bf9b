"""Data on the host: sources, text, tokenizer, image rules and the batch pipelines.

This package needs numpy, grain, sentencepiece and Pillow, and knows nothing of the models.
"""
