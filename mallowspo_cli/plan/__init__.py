"""What a recipe takes on given hardware, predicted before it runs: memory, FLOPs, time."""
