"""How the mean of the updates becomes the next model: one paper a file."""
