"""The benchmarks of ``python -m vattn bench``: one file a question, in ``host`` and ``gpu``.

A benchmark times its arms in turns within one run and yields one `Case` a setting; `runner` shows progress, prints
tables, writes JSON and draws plots. What a figure promises is the ratio between arms of one run: machines are shared.
"""
