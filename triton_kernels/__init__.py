"""Triton kernels of the router path, installed as `dodoco_ext.triton_kernels`."""
