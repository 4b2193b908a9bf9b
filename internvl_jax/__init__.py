"""InternVL in JAX: training, evaluation and conversion of the InternVL family on TPU meshes."""
