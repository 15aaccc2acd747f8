"""The benchmark behind `tools/benchmark.py`: this project against transformers and CTranslate2.

A tour, in the order in which things happen:

    command.py    arguments -> Settings -> session.run
    workload.py   what is asked of every system: prompts, lengths and arrival times, by seed
    weights.py    one random model in the forms that the systems read
    worker.py     child processes, one for each system (two for tensor parallel)
    peer.py       what all systems are asked; peers.py: in a child, one class for each
    serving.py    in a child: how a system without continuous batching serves a stream of requests
    measure.py    alternating runs, medians and spread, memory, the memory-bandwidth limit
    session.py    the loop over sizes, dtypes and workloads; writes the JSON
    report.py     the table; plot.py: the PNG

Everything is measured inside the children; the parent only tells them whose turn it is. It does not import
torch, so that starting a child costs no memory that is later taken for a system's own.
"""
