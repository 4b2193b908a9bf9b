"""Filtering and de-duplication of training data: score shards, apply rules, list what is kept.

Scores are one parquet file per shard; `filter` and `dedup` are Apache Beam pipelines over them (the
extra [curate]); their result is a list of record numbers that a source applies with `?keep=LIST`.
Data is never rewritten. Beam is imported by `pipelines` alone, and JAX by nothing here.
"""
