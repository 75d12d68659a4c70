"""What a visit to a GPU is to show, stage by stage: ``python -m benches.gpu``, or ``make gpu-evidence``.

A stage is a program of its own: it can be run by hand, and what goes wrong in it costs no other. Whatever is measured
is written down, a line of JSON for each row, the moment it is known (:mod:`.records`); ``python -m benches.report``
makes tables of what is there.
"""
