"""Attention kernels in Triton for every GPU and format: decode, plain decode, prefill, the key mean."""
