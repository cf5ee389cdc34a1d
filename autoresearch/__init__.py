"""What loop.py drives: git, processes, records. It decides nothing and never imports loop.py."""
