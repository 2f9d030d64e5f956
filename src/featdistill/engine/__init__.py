"""The loop and what it stands on: optimiser, schedule, checkpoints, processes, logging."""
