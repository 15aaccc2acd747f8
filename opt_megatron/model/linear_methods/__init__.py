"""Linear methods: the ways to store a weight [O, I] and to compute with it in inference. One file a method.

    cpu_float.py         the float weight in 32 or 16 bits, by our own kernels on a CPU (csrc/)
    onednn.py            the float weight in oneDNN's blocked order, on a CPU
    torch_linear.py      the float weight as it is, on any device
    cpu_int8.py          8-bit weights and activations, by our own kernels on a CPU
    int8.py              8-bit weights and activations by oneDNN, on a CPU
    int8_triton.py       8-bit weights, on a GPU
    int8_weight_only.py  8-bit weights, elsewhere
    cpu_int4.py          4-bit weights and 8-bit activations, by our own kernels on a CPU
    int4_triton.py       4-bit weights, on a GPU
    int4_weight_only.py  4-bit weights, elsewhere

What some of them share is in equalization.py (outlier channels), quantized_method.py, int8_rows.py, int4_groups.py and
triton_product.py. A new method is a file with a subclass of `base.LinearMethod`, and its name in the table of
`registry.py`. The choices of --quantization, the loading of checkpoints, and the model's layers, embedding and head
follow from these two.
Importing this package, or its registry, imports no torch.
"""
