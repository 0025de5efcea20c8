"""A step laid out on paper: what it would hold, by what is checkpointed and what is rebuilt, from one observed run."""
