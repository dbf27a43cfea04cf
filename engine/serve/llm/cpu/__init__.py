"""C++ kernels for CPUs, and the layers and models that run by them."""
