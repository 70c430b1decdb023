"""Tensors to stored parts and back, one block format a file.

Kernels are numba, single-threaded and free of the interpreter lock: their callers bring the threads, so
that reading and writing never wait for a parallel region. bf16 travels as its bits, in uint16.
"""
