"""The coordinator: holds the model, runs the rounds, averages the updates."""
