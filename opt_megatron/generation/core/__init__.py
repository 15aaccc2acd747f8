"""The engine: the scheduler, the KV cache, and the execution of steps on all ranks."""
