"""A CUDA device simulated on a CPU build of torch, to test and count what the program does to a GPU without one.

    from cuda_simulator.installation import install  # before torch
    install(devices=1)  # before the program under test is imported; there is no way back
    from cuda_simulator.traffic import counting
    ...                                    # torch.cuda.is_available() is True, "cuda" tensors work, backward too
    with counting() as counts:
        step()
    print(counts.launches, counts.blocking_reads, counts.uploads, counts.lines)

A tensor on the device is a wrapper that says `cuda:0` and holds a CPU tensor. All operations run on what it holds, so
results are a CPU's, and decisions on values are taken as they would be. Simulated are:

* devices: an operation that mixes CUDA tensors with CPU tensors raises DeviceMismatch, as on a GPU (scalars, and
  indices of a CUDA tensor, may be on the CPU); so does a CPU generator for a CUDA tensor. The device has random
  numbers of its own.
* traffic: kernel launches by operation; copies to the device and back, whether the host waits for them (pageable
  memory, `item`, `tolist`, `cpu`, a shape that depends on values) or not (pinned memory with non_blocking=True).
* torch.distributed: groups say that they are nccl where they would be, are gloo beneath, and refuse CPU tensors then.
* CUDA graphs: what makes the host wait raises CaptureError; a capture changes no memory, and a replay repeats the
  device's operations on the memory that they had, and nothing of what the host did.

Not simulated: time, memory (all of it is always free), real kernels and their rounding, the choice of an attention
backend, streams and races (an asynchronous copy is there at once), nccl's hangs and order, several devices in one
process (all say cuda:0), fused packages, torch.compile, torch.profiler, and inference mode (no_grad takes its place).
A tensor has no data_ptr (so safetensors and other C++ cannot save it before `cpu()`), and a pickled one comes back
on the CPU.

The modules lean on internals of torch (dispatch modes, the interfaces of the device guard and of the hooks), so that
another version may need changes.
"""
