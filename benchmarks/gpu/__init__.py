"""The path of a GPU: all that is to be measured on one, in one command; and what can be counted without one."""
