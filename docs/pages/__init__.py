"""The parts of the documentation that come from results files; ``docs/generate.py`` writes them.

``common.py`` reads results and sets tables; ``measured.py`` has the README's figures and
``results.md``, ``compiling.py`` parts of ``passes.md``, ``checkpoints.md`` and ``pretrained.md``,
``gpu.py`` ``gpu.md`` and ``paper.md``, ``consistency.py`` ``consistency.md``; ``plots.py`` the
pictures.
"""
