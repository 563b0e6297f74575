"""Tasks that come with Choral, each in a file of its own; read one to see how yours could look."""
