"""From a URI to a file system in memory: who serves it, what is in it, and the room it is given."""
