"""Models: configuration, weights, the decoder, and the Hub.

Importing this package, ``config`` or ``hub`` does not import torch; ``weights`` and ``decoder`` do.
"""
