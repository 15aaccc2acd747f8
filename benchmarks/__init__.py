"""The benchmark of `tools/benchmark.py`: this project against transformers and CTranslate2.

In the order in which things happen:

    command.py            arguments -> BenchmarkOptions (options.py) -> session.run
    workload.py           the requests that every system gets: prompts, lengths and arrival times, by seed
    weights.py            one random model in the formats that the systems read
    worker.py             child processes, one for each system (two for tensor parallel)
    system_protocol.py    the methods of a system; systems/: this project, transformers and CTranslate2, in a child
    training_systems.py   in a child: the same for a training step
    static_batching.py    in a child: how a system without continuous batching serves a stream of requests
    measure.py            alternating runs, medians and spread, the memory-bandwidth limit; peak_memory.py
    workload_runs.py      how each workload is measured, with all systems loaded
    session.py            the loop over sizes, dtypes and workloads; writes the JSON
    report.py             the table; plot.py: the PNG

Everything is measured inside the children; the parent only says which one runs. It does not import torch,
so that a child starts from a small parent and its memory is the system's.

`tools/load_test.py` measures a running server instead: load_test.py, load_client.py.
"""
