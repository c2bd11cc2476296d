"""The commands `kernels` and `profile`: benchmarks of attention and of the ops that make codes.

`profile` also covers `hamming_topk`.
"""
