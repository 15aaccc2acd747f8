"""`tools/check_gpu.py`: whether this project computes on a machine's GPUs what it should, and how fast.

    command.py      arguments -> Settings; a line on stderr for each section, the table, the exit code
    run.py          the sections, one after another: each in its own processes with a deadline; the JSON
    case.py         what one check found; table.py: all of them as a table
    plain_opt.py    OPT in plain torch, to compare with where transformers is not installed
    models.py       random checkpoints, prompts and tokens, in the processes of the sections
    sections/       a file each, with a generator of cases that runs in a process of the section

The parent process touches no GPU: a section that crashes or hangs costs itself alone.
"""
