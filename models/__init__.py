"""Torch models and their training: the Emformer student, its teacher's weights, data and loops."""
