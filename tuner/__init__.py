"""Tuner: from a recipe to a served token. Start reading at `tuner/run.py`."""
