"""Attention as pure functions of tensors.

Shapes: ``q, k`` are (B, H, N, D) and ``v`` is (B, H, N, E), with batch B, heads H, tokens N, head width D and value
width E; the result is (B, H, N, E). A key mask ``keep`` is boolean, broadcastable to (B, H, N, 1), True where a key
takes part.

Three families of linear kernels, each with the same functions, so that :mod:`visionattn.ops.scan` runs any of them over
tokens in order:

- :mod:`~visionattn.ops.positive`: positive features, given by their logarithms (most mechanisms),
- :mod:`~visionattn.ops.signed`: any features, given by their values,
- :mod:`~visionattn.ops.distance`: squared distances.

What is named after a mechanism holds its kernel and its feature map.
"""
