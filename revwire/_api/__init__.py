"""The public verbs, one file each: what a user calls, with its documentation."""
