"""Whole errands over the pipeline: commands, case files, bulk scoring, forging, DD-VQA runs, the demonstration."""
