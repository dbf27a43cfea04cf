"""Kernels in C++ for a processor, and the models that run through them."""
