"""The sections. In each file, a generator of cases that runs in a process of the section (run.py has the table)."""
