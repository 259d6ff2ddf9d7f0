"""Attention as pure functions of tensors; one module a kernel, each with its explicit ``reference`` and a fast form.

Shapes: ``q, k`` are (B, H, N, D) and ``v`` is (B, H, N, E), with batch B, heads H, tokens N, head width D and value
width E; the result is (B, H, N, E).
"""
