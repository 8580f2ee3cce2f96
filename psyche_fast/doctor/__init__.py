"""What `psyche-fast doctor` looks at: whether a machine is set up as a run wants it.

Each file has checks of one kind, functions that give findings; `command.py` carries them out. What
needs torch is in `trial.py`, a process of its own: a broken torch may end its process, or hang.
"""
