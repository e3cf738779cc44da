"""Embeddings: the features of a directory of images, their neighbors and a map."""
