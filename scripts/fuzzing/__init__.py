"""The parts of ``fuzz.py``: mutators, the kinds of file with their valid seeds and readers, and the workers."""
