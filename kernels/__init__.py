"""One file per tensor operation; each opens with its formula and holds the plain PyTorch reference.

The reference is the specification, the test oracle, and but for attention the CPU path. Import the
file you need, for example `from kernels.rms_norm import rms_norm`; this package imports nothing.
"""
