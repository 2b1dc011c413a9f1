"""A package of one's own: a method, a reader with its catalogue entry, and a task. Nothing in sarfm knows of it."""
