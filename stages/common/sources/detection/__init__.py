"""What a set of rows is: the kind of its task, and what a person should know before training on it."""
